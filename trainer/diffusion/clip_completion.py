"""Clips of which a part is known, and clips in blocks: the sampler's loop, once for each block,
with the hooks of `reconstruction.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.backbones.solvers import check_solver
from trainer.diffusion.known_frames import KnownFrames, without
from trainer.diffusion.reconstruction import Langevin, Reconstruction
from trainer.diffusion.sampler_loop import Denoising
from trainer.diffusion.sampling_settings import Sampling

Noise = Callable[[Sampling], Tensor]


def check_completion(
    backbone: Backbone,
    settings: Sampling,
    known: KnownFrames | None = None,
    *,
    edits: bool = False,
) -> None:
    """Checks that a clip can be made in blocks, or of what is known of it. edits: whether a method
    edits a source.

    Raises:
        ValueError: the backbone, a method of it, the solver or the clip does not go with that.
    """
    if settings.blocks is None and known is None:
        return
    asked = "known=" if settings.blocks is None else "block="
    if edits:
        raise ValueError(f"{asked} does not go with the edit of a source; leave one out")
    if backbone.clip_frames.in_time:
        raise ValueError(
            f"{asked} conditions on single frames, and latents of {backbone.name} hold several; "
            "leave it out"
        )
    for name, hooks in backbone.sampling_hooks.items():
        if any(hook.begin or hook.before_step or hook.after_step for hook in hooks):
            raise ValueError(
                f"{asked} does not go with methods.{name}, which changes the latents between the "
                "steps itself; leave one out"
            )
    _check_solver(backbone, settings, asked)
    if known is not None and max(known.at) >= settings.frames:
        raise ValueError(
            f"frame {max(known.at)} is known of a clip of {settings.frames} frames, counted from "
            "0; give more frames, or fewer known ones"
        )


def _check_solver(backbone: Backbone, settings: Sampling, asked: str) -> None:
    """Steps that keep x_t = alpha x0 + sigma noise, and nothing of earlier steps."""
    own, solver = backbone.scheduler_class.__name__, settings.sampler
    if solver in (None, "ddpm"):
        return
    chosen = check_solver(str(solver), backbone.alphas_cumprod is None, key="scheduler")
    if chosen.options or own not in (chosen.vp, chosen.flow):
        others = "" if backbone.alphas_cumprod is None else ", or give ddpm"
        raise ValueError(f"scheduler={solver} does not go with {asked}; leave it out{others}")


def completed_clips(denoising: Denoising, known: KnownFrames | None, noise: Noise) -> Tensor:
    """Clean latents (n f, c, h, w) of clips, of which a part may be known, in one block or several.
    noise: (settings of a block) -> what it begins from, drawn anew at each call."""
    settings = denoising.settings
    frames, blocks = settings.frames, settings.blocks
    spans = [range(frames)] if blocks is None else blocks.spans(frames)
    made: Tensor | None = None  # n f c h w, the frames so far
    for span in spans:
        parts = [] if known is None else [known.within(span)]
        if made is not None:
            shared = range(made.shape[1] - span.start)
            parts = [each and _beside(each, shared) for each in parts]
            parts.append(KnownFrames(made[:, span.start :], tuple(shared)))
        clips = _block(denoising, [each for each in parts if each], len(span), noise=noise)
        new = clips if made is None else clips[:, made.shape[1] - span.start :]
        made = new if made is None else torch.cat([made, new], 1)
    assert made is not None
    return made.flatten(0, 1)


def _beside(known: KnownFrames, made: range) -> KnownFrames | None:
    """What is known beside the frames that were made, which hold it already."""
    return without(known, made) if known.shrink == 1 else known


def _block(
    denoising: Denoising, known: Sequence[KnownFrames], frames: int, *, noise: Noise
) -> Tensor:
    """Clean latents (n, frames, c, h, w) of one block."""
    settings = denoising.settings
    hooks = []
    if settings.corrector:
        hooks.append(Langevin(denoising.generators, settings.corrector).hook)
    if known:
        hooks.append(Reconstruction(tuple(known), settings.reconstruction).hook)
    of_block = replace(settings, frames=frames, blocks=None)
    own = replace(denoising, settings=of_block, completing=tuple(hooks))
    return own.run(noise(of_block).to(denoising.backbone.device)).unflatten(0, (-1, frames))
