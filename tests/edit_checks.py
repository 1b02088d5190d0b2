"""What tests of editing ops share: a site's run with one op against plain loops, and the last
latents of whole samplings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.attention.denoiser_traits import JointTraits
from trainer.attention.hooks import Prediction
from trainer.attention.op import by_stage
from trainer.attention.rows import Rows
from trainer.attention.spans import Lengths
from trainer.attention.stages import run_stages
from trainer.config.load import methods_of
from trainer.diffusion.edit_source import EditSource
from trainer.diffusion.image_edit import EditedPictures, EditJob, edit_pictures
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.kernels.softmax import eager
from trainer.methods.apply import apply_methods

GROUPS = ("source/uncond", "target/uncond", "source/cond", "target/cond")
UNGUIDED_SOURCE = ("target/uncond", "source/cond", "target/cond")
HOW = Sampling(steps=4, guidance=3.0)
HEADS, DIM = 2, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call_at(
    site: Any, step: int = 0, *, steps: int = 4, groups: Sequence[str] = GROUPS, count: int = 1
) -> SiteCall:
    ctx = StepContext(step, steps, torch.zeros(()), groups=Rows.of(groups, count))
    return SiteCall(site, replace(ctx, latent_size=(8, 8)))


def joint_call(site: Any, *, text: int, image: int, **how: Any) -> SiteCall:
    """At a joint site whose text comes first."""
    joint = replace(site, kind="joint", joint=JointTraits("*", text_first=True))
    call = call_at(joint, **how)
    call.lengths = Lengths(stream=image, text=text, rows=4)
    return call


def site_of(model: Any, kind: str = "self", divisor: int = 2) -> Any:
    return next(s for s in model.sites if s.kind == kind and s.divisor == divisor)


def qkv(rows: int, tokens: int, keys: int | None = None) -> list[Tensor]:
    sizes = (tokens, keys or tokens, keys or tokens)
    return [drawn(rows, HEADS, size, DIM, seed=n) for n, size in enumerate(sizes)]


def outputs(op: Any, made: Sequence[Tensor], call: SiteCall) -> dict[str, Tensor]:
    """The output of a site with an op, by group of rows."""
    q, k, v = made
    plain = partial(eager, scale=call.scale)
    o = run_stages(by_stage((op,)), (q, k, v), mask=None, call=call, plain=plain)
    return {name: o[rows] for name, rows in call.ctx.groups.slices.items()}


def loop_attention(q: Tensor, k: Tensor, v: Tensor, keys: Sequence[int] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (heads, n, d), one query after another; keys: those it sees."""
    seen = list(range(k.shape[1])) if keys is None else list(keys)
    found = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            scores = torch.stack([q[head, i] @ k[head, j] for j in seen]) / q.shape[2] ** 0.5
            weights = scores.exp() / scores.exp().sum()
            found[head, i] = sum(w * v[head, j] for w, j in zip(weights, seen, strict=True))
    return found


def latents(
    model: Any, prompts: Sequence[str], source: EditSource | None = None, how: Sampling = HOW
) -> Tensor:
    """The last latents of pictures from the seed 3."""
    seen: list[Tensor] = []
    keep = lambda _, x_t: seen.append(x_t.clone())  # noqa: E731
    sample(model, prompts, [3] * len(prompts), settings=how, edited=source, on_step=keep)
    return seen[-1]


def edited(
    model: Any,
    methods: Mapping[str, Mapping[str, Any]],
    *prompts: str,
    source: str,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """The last latents of edits and of their source, by methods that the model loses again; more:
    fields of `EditSource`."""
    seen: list[Tensor] = []
    apply_methods(model, methods_of(methods), trains=False)
    told = EditSource(source, watch=lambda _, x_s: seen.append(x_s.clone()), **more)
    try:
        found = latents(model, list(prompts), told)
    finally:
        model.sampling_hooks.clear()
    return found, seen[-1]


def some_trajectory(model: Any, steps: int = HOW.steps) -> dict[int, Tensor]:
    """Of an inversion, as far as shapes go."""
    start = drawn(1, model.latent_channels, 8, 8, seed=9)
    return {step: start * (1 - 0.1 * step) for step in range(steps + 1)}


def pictures(model: Any, methods: Mapping[str, Mapping[str, Any]], job: EditJob) -> EditedPictures:
    apply_methods(model, methods_of(methods), trains=False)
    try:
        return edit_pictures(model, job)
    finally:
        model.sampling_hooks.clear()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def predicted(x_t: Tensor, x_s: Tensor) -> Prediction:
    """After a step, of a denoiser that gives its input back; x_s: the source's latents."""

    def same(output: Tensor, x: Tensor) -> Tensor:
        return x

    level = (torch.ones(()), torch.zeros(()))
    return Prediction(x_t, {}, x_t, convert=same, revert=same, find_level=lambda: level, source=x_s)
