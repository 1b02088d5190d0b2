"""Which ops can share a site, and which inputs a kernel refuses. That no two methods claim the same
thing is checked in `methods/apply.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trainer.attention.errors import TakenError
from trainer.attention.op import STAGES, Op, by_stage, has_stage, label
from trainer.attention.projections import Role, context_roles, why_missing
from trainer.attention.stages import AT_CALL

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site


def refuse_conflicts(ops: tuple[Op, ...], site: Site) -> None:
    """Raises `ValueError` where ops cannot share a site, naming both and the site: `TakenError`
    where a method has replaced the kernel already."""
    for op in ops:
        _refuse_undeclared(op)
        refuse_unavailable(op, site)
        _refuse_resized(op, ops, site)
    kernels = by_stage(ops)["kernel"]
    _refuse_without_map(ops, kernels, site)
    if not kernels:
        if site.native.linear:
            _refuse_on_linear(ops, site)
        return
    first, *others = kernels
    if site.native.linear and not first.traits.swaps:
        raise ValueError(
            f"{label(first)} computes softmax attention, and that of {site.name!r} is linear, as "
            "its model was trained; choose other sites, as in sites=cross"
        )
    if others:
        if first.traits.owner is not None:
            raise TakenError(site.name, "the kernel", first.traits.owner)
        raise ValueError(
            f"{label(first)} and {label(others[0])} both replace the kernel of {site.name!r}; "
            "install one of them, or choose other sites for the second"
        )
    for op in ops:
        _refuse_beside_kernel(op, first, site)


def _refuse_undeclared(op: Op) -> None:
    if not any(has_stage(op, stage) for stage in STAGES):
        raise ValueError(
            f"op {op.name!r} has no stage to run at; give it one of {', '.join(STAGES)}"
        )
    reads = has_stage(op, "scores") or has_stage(op, "probs")
    if reads != op.traits.scores:
        raise ValueError(
            f"op {op.name!r} has {'a' if reads else 'no'} stage for scores or probabilities, and "
            f"its traits say scores={op.traits.scores}; make them agree"
        )


def _refuse_without_map(ops: tuple[Op, ...], kernels: tuple[Op, ...], site: Site) -> None:
    """Refuses what ranks by a map where attention has none."""
    other = next((kernel for kernel in kernels if kernel.traits.swaps), None)
    for op in ops:
        if op.traits.softmax and (other is not None or site.native.linear):
            why = "linear, as its model was trained" if other is None else f"that of {label(other)}"
            raise ValueError(
                f"{label(op)} needs the map of softmax attention, and the kernel of {site.name!r} "
                f"is {why}; choose other sites"
            )


def _refuse_resized(op: Op, ops: tuple[Op, ...], site: Site) -> None:
    """Refuses what needs every token, beside an op after which there are fewer."""
    first = next((other for other in ops if other.traits.resizes and other is not op), None)
    if first is None:
        return
    if op.traits.grid or op.traits.scores or op.traits.resizes:
        raise ValueError(
            f"{label(op)} needs every token of {site.name!r}, and {label(first)} changes how many "
            "there are; choose other sites for one of them"
        )


def _refuse_beside_kernel(op: Op, kernel: Op, site: Site) -> None:
    """Refuses what a kernel at the same site cannot give another op."""
    if op.traits.scores:
        raise ValueError(
            f"{label(op)} asks for scores or probabilities of {site.name!r}, where the kernel of "
            f"{label(kernel)} computes none; choose other sites for one of them"
        )
    if op.traits.appends and not kernel.traits.more_keys:
        raise ValueError(
            f"{label(op)} gives {site.name!r} further keys, and the kernel of {label(kernel)} "
            "needs one for each query; choose other sites for one of them"
        )
    if has_stage(op, "mask") and not kernel.traits.masks:
        raise ValueError(
            f"{label(op)} has a mask for {site.name!r}, where the kernel of {label(kernel)} takes "
            "none; choose other sites for one of them"
        )


def _refuse_on_linear(ops: tuple[Op, ...], site: Site) -> None:
    for stage, what in (("mask", "a mask"), ("scores", "scores"), ("probs", "probabilities")):
        for op in ops:
            if has_stage(op, stage):
                raise ValueError(
                    f"{label(op)} needs {what} at {site.name!r}, whose attention is linear, as its "
                    "model was trained, and has none; choose other sites, as in sites=cross"
                )


def refuse_unavailable(op: Op, site: Site) -> None:
    """Refuses an op whose stages, or what it assumes of the tokens, a site cannot give."""
    if op.traits.grid and (site.kind == "joint" or site.text_alone):
        raise ValueError(
            f"{label(op)} works on tokens of the image alone, and {site.name!r} has text tokens "
            "among them; choose other sites, as in sites=self"
        )
    if op.traits.grid and site.undeclared:
        raise ValueError(
            f"{label(op)} works on tokens of the image alone, and {site.name!r} may have others: "
            "the model's family does not declare them; choose another backbone"
        )
    if not site.keeps_processor:
        return
    if op.traits.classic:
        raise ValueError(
            f"{label(op)} computes again what classic attention computes, and {site.name!r} is "
            f"{type(site.module).__name__}, which computes more; choose other sites"
        )
    if site.native.by_row and any(has_stage(op, stage) for stage in AT_CALL):
        raise ValueError(
            f"{label(op)} acts on whole batches, and {site.name!r} attends row by row; choose "
            "other sites, or another backbone"
        )
    for stage in ("skip", "tokens", "context", "project", "restore", "block"):
        if has_stage(op, stage) and (why := _why_not(stage, site)):
            raise ValueError(
                f"{label(op)} has the stage {stage}, which {site.name!r} cannot give: {why}; "
                "choose other sites"
            )


def _why_not(stage: str, site: Site) -> str:
    """Why a layer that keeps its processor has no such stage; empty where it has."""
    module: Any = site.module
    if stage == "skip":
        return "it keeps its processor, which runs whatever is known"
    if stage == "block":
        return "the block around it returns image and text" if site.kind == "joint" else ""
    if stage in ("context", "project"):
        roles: tuple[Role, ...] = ("k", "v")
        roles = context_roles(site.kind) if stage == "context" else roles
        lost = [role for role in roles if not site.has(role)]
        if lost:
            return f"{type(module).__name__} {why_missing(module, lost[0])}"
        normed = stage == "context" and getattr(module, "norm_cross", None) is not None
        return "its processor norms the text first" if normed else ""
    if getattr(module, "group_norm", None) is not None:
        return "its processor norms the tokens itself"
    if getattr(module, "residual_connection", False):
        return "its processor adds the residual itself"
    if stage == "restore" and not site.has("out"):
        return f"{type(module).__name__} {why_missing(module, 'out')}"
    return ""


def refuse_recompute(ops: Iterable[Op]) -> None:
    """Refuses ops that hand tensors from one block to another, where gradient checkpointing is to
    calculate blocks again, one by one."""
    for op in ops:
        if op.traits.hands_over:
            raise ValueError(
                f"{label(op)} keeps tokens of one block for a later one, and "
                "run.gradient_checkpointing=true calculates blocks again one by one; give "
                "run.gradient_checkpointing=feed_forward, or false"
            )


def refuse_mask(mask: Tensor | None, op: Op, call: SiteCall) -> None:
    """Refuses a mask that comes with the model's own call, for a kernel that takes none."""
    if mask is not None:
        raise ValueError(
            f"the model masks keys at {call.site.name!r}, and the kernel of {label(op)} takes "
            "no mask; choose other sites, or inputs of one length"
        )


def refuse_other_keys(queries: Tensor, keys: Tensor, *, op: Op, call: SiteCall) -> None:
    """Refuses further keys, for a kernel in which queries and keys are the same tokens."""
    if keys.shape[2] != queries.shape[2]:
        raise ValueError(
            f"{label(op)} needs the tokens of {call.site.name!r} to attend to themselves, and "
            f"there are {keys.shape[2]} keys for {queries.shape[2]} queries; choose sites of "
            "self-attention to which no other method appends keys"
        )
