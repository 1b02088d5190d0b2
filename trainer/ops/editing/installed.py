"""Ops that are at their sites while an edit is sampled, and not otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trainer.attention.hooks import SamplingHook, SourceBranch
from trainer.attention.op import has_stage, label
from trainer.attention.residual_blocks import hook_residuals, residual_blocks
from trainer.attention.sites import require

if TYPE_CHECKING:
    from trainer.attention.hooks import Sampler
    from trainer.attention.op import Op
    from trainer.attention.residual_blocks import Change
    from trainer.attention.sites import Site


class Editor(Protocol):
    """What edits one sampling after another."""

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        """Prepares for a sampling; the ops to install, and where. Raises ValueError for words,
        windows, masks and sites that do not fit."""
        ...

    def end(self) -> None:
        """Forgets what it was told, and what it kept."""
        ...


def editing_hook(
    owner: str, editor: Editor, source: SourceBranch | None, **functions: Any
) -> SamplingHook:
    """The hook of a method that edits: the ops of `begin` are installed before the first step and
    removed after the last one. owner: the method, which refusals name; source: None for one that
    edits without; functions: further ones of the hook, as `after_step`."""
    installed: list[Op] = []

    def open_sampling(sampler: Sampler) -> None:
        if source is not None and sampler.source_prompt is None:
            return
        try:
            for op, sites in editor.begin(sampler).items():
                sampler.host.install(op, sites)
                installed.append(op)
        except ValueError as error:
            who, said = f"methods.{owner}", str(error)
            if said.startswith(who):  # a refusal that names its op by it
                said = f"it{said.removeprefix(who)}"
            raise ValueError(f"{who}: {said}") from error

    def close_sampling(sampler: Sampler) -> None:
        while installed:
            sampler.host.remove(installed.pop())
        editor.end()

    return SamplingHook(open=open_sampling, close=close_sampling, source=source, **functions)


def edited_sites(sampler: Sampler, selector: str, *, kinds: Sequence[str], op: Op) -> list[Site]:
    """The sites that a selector chooses, of the model that samples; ValueError as `refuse_kinds`,
    or where there is none."""
    return refuse_kinds(require(sampler.sites, selector, "sites"), kinds, op)


def refuse_kinds(sites: list[Site], kinds: Sequence[str], op: Op) -> list[Site]:
    """The sites; ValueError for one of another kind than these, or whose attention is linear."""
    for site in sites:
        if site.native.linear:
            raise ValueError(
                f"{label(op)} edits softmax attention, and that of {site.name!r} is linear; choose "
                "other sites"
            )
        if site.kind not in kinds:
            raise ValueError(
                f"{label(op)} edits {' and '.join(kinds)} attention, and {site.name} is "
                f"{site.kind}; choose other sites, as in sites={kinds[0]}"
            )
    return sites


def hooked_features(sampler: Sampler, selector: str, change: Change) -> list[Any]:
    """Handles of a change of the residual blocks that a selector chooses. Raises ValueError, which
    names the options `features` and `feature_steps`, where there is none."""
    try:
        blocks = residual_blocks(sampler.host.denoiser, selector)
    except ValueError as error:
        raise ValueError(f"features: {error}; feature_steps=null leaves them out") from None
    return hook_residuals(sampler.host, blocks, change)


def refuse_kernels(sampler: Sampler, sites: Sequence[Site], op: Op) -> None:
    """Raises ValueError for a site whose softmax attention another method replaces: ops that
    attend once more would compute another attention than the site does."""
    for site in sites:
        hosted = sampler.host.processors.get(site.name)
        for other in () if hosted is None else hosted.ops:
            if has_stage(other, "kernel"):
                raise ValueError(
                    f"{label(op)} computes softmax attention beside {site.name!r}, where the "
                    f"kernel of {label(other)} computes another; choose other sites for one"
                )
