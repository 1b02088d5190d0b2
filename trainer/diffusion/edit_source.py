"""The source of an edit, whose rows run beside those that are generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.condition import Condition
    from trainer.attention.hooks import SourceBranch
    from trainer.attention.rows import Rows
    from trainer.backbones.backbone import Backbone
    from trainer.diffusion.sampling_settings import Sampling

SOURCE, SOURCE_COND, SOURCE_UNCOND = "source", "source/cond", "source/uncond"


@dataclass(frozen=True, eq=False)
class EditSource:
    """prompt: what the source shows. inverted: whether sampling begins from the source's inversion,
    which is made without guidance. uncond (steps, n, d): what its unconditional rows are told at
    each step in place of the negative prompt, as `null_text` finds it; those of the edit are told
    the negative prompt all the same ("decoupled guidance", arXiv 2303.04761, section 3.2).
    trajectory: the latents (1, c, h, w) of the inversion before each step, and after the last one;
    replays: whether the rows of the source are these at each step; guides: whether they are guided
    all the same; tells: makes what they are told of their prompt's condition. reference: as
    trajectory, of a second picture. masks (1, 1, H, W): by `source`
    and `target`. watch: gets each step's number and the source's latents after it."""

    prompt: str
    inverted: bool = False
    uncond: Tensor | None = None
    trajectory: Mapping[int, Tensor] = field(default_factory=dict)
    replays: bool = False
    guides: bool = False
    tells: Callable[[Condition], Condition] | None = None
    reference: Mapping[int, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    watch: Callable[[int, Tensor], None] | None = None

    @property
    def guided(self) -> bool:
        """Whether its rows are guided: guidance alone would lead away from what was inverted."""
        return self.guides or self.uncond is not None or not self.inverted

    def latents(self, step: int, made: Tensor) -> Tensor:
        """Its latents (b f, c, h, w) before a step: those that sampling made, or of inversion."""
        known = self.trajectory.get(step) if self.replays else None
        if known is None:
            return made
        return known.to(made).repeat(len(made) // len(known), 1, 1, 1)

    def after(self, step: int, made: Tensor) -> Tensor:
        """Its latents after a step, which `watch` gets."""
        found = self.latents(step + 1, made)
        if self.watch is not None:
            self.watch(step, found)
        return found

    def told(self, condition: Condition, rows: Rows, step: int) -> Condition:
        """The condition of all rows of `rows` at a step."""
        if self.tells is not None:
            cond = rows.find(SOURCE_COND)
            made = self.tells(condition.rows(cond)).tokens
            assert condition.tokens is not None and made is not None, "only texts are told anew"
            tokens = condition.tokens.clone()
            tokens[cond] = made.to(tokens)
            condition = replace(condition, tokens=tokens)
        if self.uncond is None or SOURCE_UNCOND not in rows.slices:
            return condition
        assert condition.tokens is not None
        own = rows.find(SOURCE_UNCOND)
        tokens = condition.tokens.clone()
        tokens[own] = self.uncond[step].to(tokens)
        return replace(condition, tokens=tokens)


def groups_of(settings: Sampling, edited: EditSource | None) -> tuple[str, ...]:
    """The groups of rows of one call of the denoiser: those of the settings, each after that of the
    source."""
    if edited is None:
        return settings.groups
    both = [f"{branch}/{group.rpartition('/')[2]}" for group in settings.groups
            for branch in (SOURCE, "target")]  # fmt: skip
    return tuple(name for name in both if edited.guided or name != SOURCE_UNCOND)


def source_branch(backbone: Backbone) -> tuple[str, SourceBranch] | None:
    """The method that edits a source, and what it says of it; None where none does."""
    for name, hooks in backbone.sampling_hooks.items():
        for hook in hooks:
            if hook.source is not None:
                return name, hook.source
    return None


def edit_source(backbone: Backbone, given: EditSource | None, steps: int) -> EditSource | None:
    """The source of a sampling: the one given, or else that of a method; None for none.

    Raises:
        ValueError: no method edits a source, one that does has none, or embeddings of another
        number of steps.
    """
    found = source_branch(backbone)
    if found is None:
        if given is None:
            return None
        raise ValueError(
            f"source_prompt={given.prompt!r} is for a method that edits a source, and this model "
            "has none; give methods.p2p={}, or an adapter of recipe=videop2p"
        )
    name, branch = found
    if given is None and branch.prompt is not None:
        given = EditSource(branch.prompt)
    _check_given(name, branch, given)
    if given is not None and given.uncond is not None and len(given.uncond) != steps:
        raise ValueError(
            f"the null-text embeddings are those of {len(given.uncond)} steps, and this sampling "
            f"has {steps}; give steps={len(given.uncond)}, or optimise them anew"
        )
    asked: dict[str, Any] = {key: getattr(branch, key) for key in ("replays", "guides", "tells")}
    if given is not None and any(getattr(given, key) != own for key, own in asked.items()):
        return replace(given, **asked)
    return given


def _check_given(name: str, branch: SourceBranch, given: EditSource | None) -> None:
    """Raises ValueError for a method that is not given what it reads."""
    if given is None and branch.needed:
        raise ValueError(
            f"methods.{name} edits a source and is told of none; give source_prompt=<what it shows>"
        )
    if branch.inverts and (given is None or not given.trajectory):
        raise ValueError(
            f"methods.{name} reads the inversion of its source, and there is none; give image=<the "
            "source> to `edit`"
        )
    if branch.refers and (given is None or not given.reference):
        raise ValueError(
            f"methods.{name} puts a second picture into its source, and there is none; give "
            "reference=<a picture> to `edit`"
        )
