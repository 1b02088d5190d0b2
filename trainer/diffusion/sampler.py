"""From prompts to pictures and clips, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from trainer.attention.condition import Condition
from trainer.attention.further_conditions import told_groups
from trainer.backbones.backbone import Backbone
from trainer.backbones.solvers import check_solver
from trainer.diffusion.channel_values import channels_for
from trainer.diffusion.clip_completion import check_completion, completed_clips
from trainer.diffusion.edit_source import SOURCE_COND, EditSource, edit_source, groups_of
from trainer.diffusion.from_image import InitialImage, noised
from trainer.diffusion.guidance import COND, GIVEN
from trainer.diffusion.known_frames import KnownFrames
from trainer.diffusion.sampler_loop import Denoising, latent_extent
from trainer.diffusion.sampling_settings import Sampling
from trainer.diffusion.settled import settled

DEFAULT = Sampling()


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: Sampling = DEFAULT,
    channels: Mapping[str, Tensor] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    start: Tensor | None = None,
    image: InitialImage | None = None,
    known: KnownFrames | None = None,
    edited: EditSource | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Pictures (b, 3, H, W) in [-1, 1], one for each prompt and seed, the same in any batch up to
    rounding; of more `settings.frames` than 1 clips (b * frames, 3, H, W), their frames adjacent.

    channels: values (b f, n, h, w) of further input channels by name, see `channels_for`; inputs:
    what further conditions are made of, each (b, ...); start: latents in place of noise; image: to
    begin from; known: what is known of the clips; edited: the source that a method edits; on_step:
    gets each step's number and latents. Raises ValueError for what does not fit."""
    settings = settings.on(embeds=backbone.embeds_guidance)
    edited = edit_source(backbone, edited, settings.steps)
    check_hooks(backbone, settings, image, edits=edited is not None)
    check_completion(backbone, settings, known, edits=edited is not None)
    texts, groups = prompts_of(prompts, seeds, settings, edited=edited), groups_of(settings, edited)
    with evaluating(backbone), settled(backbone):
        denoising = Denoising(
            backbone,
            settings.told(_condition(backbone, texts, inputs, groups=groups)),
            clips=len(prompts),
            settings=settings,
            given=not (start is None and image is None),
            channels=channels or {},
            on_step=on_step,
            generators=generators_of(seeds),
            prompts=prompts,
            edited=edited,
        )
        return _decoded(denoising, clean_latents(denoising, start=start, image=image, known=known))


def _condition(
    backbone: Backbone,
    texts: Sequence[str],
    inputs: Mapping[str, Tensor] | None,
    groups: Sequence[str],
) -> Condition:
    """Of all rows, those of a group adjacent. What is told beside the text, the rows see that are
    generated, except those that are told nothing."""
    condition = backbone.encode_prompts(texts)
    placed = {name: value.to(backbone.device) for name, value in (inputs or {}).items()}
    sees = [group in (COND, GIVEN) for group in groups]
    with backbone.computing():
        return told_groups(backbone, condition, placed, sees=sees)


def _decoded(denoising: Denoising, x_0: Tensor) -> Tensor:
    """Clean latents (b f, c, h, w) as pixels (b * frames, 3, H, W), each clip by itself."""
    clips = x_0.split(denoising.frames if denoising.settings.frames > 1 else len(x_0))
    return torch.cat([denoising.backbone.decode(clip, denoising.frames) for clip in clips])


def clean_latents(
    denoising: Denoising,
    *,
    start: Tensor | None,
    image: InitialImage | None,
    known: KnownFrames | None,
) -> Tensor:
    """What a sampler makes (b f, c, h, w) of noise, or of what `sample` is given beside it.

    Raises:
        ValueError: a start that a clip in blocks, or of which a part is known, does not have.
    """
    backbone, settings, drawn = denoising.backbone, denoising.settings, denoising.generators
    if settings.blocks is not None or known is not None:
        if denoising.given:
            raise ValueError(
                "clips in blocks, and those of which a part is known, begin from noise of their "
                "own; leave out start and image, or blocks and known"
            )
        if settings.blocks is not None and denoising.channels:
            names = ", ".join(denoising.channels)
            raise ValueError(
                f"block= does not go with the input channels {names}, whose values are of the "
                "whole clip; leave it out"
            )
        return completed_clips(denoising, known, partial(noise_of, backbone, drawn))
    if image is not None:
        return denoising.from_image(*noised(denoising, image, drawn))
    x_t = noise_of(backbone, drawn, settings) if start is None else start
    return denoising.run(x_t.to(backbone.device))


def prompts_of(
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sampling,
    *,
    edited: EditSource | None = None,
) -> list[str]:
    """The texts of all rows, those of a group adjacent, in the order of `groups_of`."""
    if len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed to each prompt"
        )
    texts = {COND: list(prompts)}
    if edited is not None:
        texts[SOURCE_COND] = [edited.prompt] * len(prompts)
    uncond = [settings.negative] * len(prompts)
    return [text for group in groups_of(settings, edited) for text in texts.get(group, uncond)]


def check_hooks(
    backbone: Backbone,
    settings: Sampling,
    image: InitialImage | None = None,
    *,
    edits: bool = False,
) -> None:
    """Checks that what methods do between the steps goes with a solver and an image, and guidance
    with the backbone. edits: whether a source is edited; a method for that alone does nothing else.

    Raises:
        ValueError: names the method or the option.
    """
    if settings.temporal_guidance != 1 and backbone.clip_frames.in_time:
        raise ValueError(
            f"temporal_guidance={settings.temporal_guidance:g} compares frames with pictures of "
            f"their own, and latents of {backbone.name} hold several frames; leave it out"
        )
    acting = [
        name
        for name, hooks in backbone.sampling_hooks.items()
        if any(edits or hook.source is None or hook.source.needed for hook in hooks)
    ]
    if not acting:
        return
    name, solver = acting[0], settings.sampler
    own = backbone.scheduler_class.__name__
    if solver is not None:
        chosen = check_solver(solver, backbone.alphas_cumprod is None, key="scheduler")
        if chosen.options or own not in (chosen.vp, chosen.flow):
            raise ValueError(
                f"scheduler={solver} does not go with methods.{name}, which changes the latents "
                f"between the steps of {own}; leave scheduler out"
            )
    if image is not None and any(hook.begin for hook in backbone.hooks):
        raise ValueError(
            f"image= does not go with methods.{name}, which has a start of its own; leave one out"
        )


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """What the noise of each picture or clip is drawn from, on the CPU."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise_of(
    backbone: Backbone, generators: Sequence[torch.Generator], settings: Sampling
) -> Tensor:
    """A latent (b f, c, h, w) of unit noise, each clip by its generator.

    Raises:
        ValueError: a size, or a number of frames, that the model cannot make.
    """
    frames, height, width = latent_extent(backbone, settings)
    shape = (frames, backbone.latent_channels, height, width)
    return torch.cat([torch.randn(shape, generator=own) for own in generators])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; after it, each module is in its earlier mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def sample_many(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    settings: Sampling = DEFAULT,
    batch_size: int = 32,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """`sample` in batches of at most `batch_size` pictures or clips: (n * frames, 3, H, W) on the
    CPU. inputs: of all n, as of `channels_for` and `sample`."""
    parts = []
    for at in (slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)):
        own = {name: value[at] for name, value in (inputs or {}).items()}
        channels = channels_for(backbone, seeds[at], settings, inputs=own)
        found = sample(
            backbone,
            prompts[at],
            seeds[at],
            settings=settings,
            channels=channels,
            inputs=own,
        )
        parts.append(found.cpu())
    return torch.cat(parts)
