"""What a backbone says of itself: sizes of pictures and latents, how it reads text, which noise
levels it is sampled with. All of it is of its parts' configurations and its family's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.attention.denoiser_traits import Layout
from trainer.backbones.class_names import ClassPrompts, classes_of
from trainer.backbones.clip_frames import ClipFrames
from trainer.backbones.family import Family
from trainer.backbones.long_prompts import Prompts
from trainer.backbones.noise_levels import Extent, NoiseLevels, shift_by_tokens, shift_of


class BackboneFacts(nn.Module):
    """The part of a `Backbone` that needs no weights. Its attributes are set there."""

    declared: Family
    denoiser_name: str
    vae: Any
    options: dict[str, Any]
    prompt_lengths: dict[str, int]
    scheduler_config: dict[str, Any]
    scheduler_class: Any
    alphas_cumprod: Tensor | None
    _encoder_names: tuple[str, ...]
    at_rest: set[str]  # parts that stay in main memory, see `resting.py`

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of every module, by which it is moved; weights of parts at rest stay where they
        are."""
        resting = (self.get_submodule(part) for part in self.at_rest)
        kept = {id(value) for part in resting for value in part.parameters()}
        return super()._apply(lambda value: value if id(value) in kept else fn(value), recurse)

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        found: torch.device = next(self.denoiser.parameters()).device
        return found

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {part: getattr(self, part) for part in self._encoder_names}

    @property
    def clip_frames(self) -> ClipFrames:
        """How many latent frames a clip has."""
        return self.declared.latents.frames(self.vae.config)

    @property
    def divisor(self) -> int:
        """Pixels along an edge per latent."""
        pixels = self.declared.latents.pixels(self.vae.config)
        assert pixels is not None, "the config of a VAE that was loaded names its levels"
        return pixels

    @property
    def multiple(self) -> int:
        """Pixels that divide the sides of all pictures it takes."""
        return self.divisor * self.patch

    @property
    def patch(self) -> int:
        """Latents along an edge of an image token; 1 for a U-Net."""
        return self.declared.patch(self.denoiser.config)

    @property
    def layout(self) -> Layout:
        """How the denoiser takes clips, see `DenoiserTraits`."""
        return self.declared.traits.layout

    @property
    def resolution(self) -> int:
        """The side in pixels the backbone was trained at."""
        size = self.declared.trained_at(self.denoiser.config)
        assert size is not None, "a family says so where a config does not"
        return size * self.divisor

    @property
    def latent_channels(self) -> int:
        config, own = self.denoiser.config, self.declared.channels
        return int(config.in_channels if own is None else own(config))

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is part of the denoiser, distilled into it, as an input or at one scale:
        no rows are unconditional then, unless asked for by `Sampling.true_guidance`."""
        own = self.declared.embeds_guidance(self.denoiser.config)
        return own or self.distilled is not None

    @property
    def distilled(self) -> str | None:
        """Why plain training would spoil it; None where it does not."""
        config = self.denoiser.config
        return self.declared.distilled(config, self.scheduler_config, self.options)

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of one row of each field of a prompt's condition."""
        if self.declared.shapes is not None:
            return self.declared.shapes(self)
        width = next(iter(self.text_encoders.values())).config.hidden_size
        return {"tokens": (self.prompts.length, int(width))}

    @property
    def text_width(self) -> int:
        """Of the tokens that the denoiser gets."""
        return self.text_shapes["tokens"][1]

    @property
    def text_length(self) -> int:
        """Tokens that the denoiser gets of a prompt, with padding; 0 where it is told a class."""
        return self.text_shapes["tokens"][0] if self.text_encoders else 0

    @property
    def sequence_length(self) -> int:
        """Tokens of a prompt that its last text encoder reads, with padding: `max_sequence_length`
        of stock pipelines, also where the folder lacks that text encoder."""
        part = next(iter(self.declared.text_encoders[::-1]), "")
        if part not in self.prompt_lengths:
            return self.text_length
        here = part in self._encoder_names
        return Prompts(self, part).length if here else self.prompt_lengths[part]

    @property
    def prompts(self) -> Prompts | ClassPrompts:
        """How the text encoder whose tokens the denoiser gets reads prompts, or which classes they
        are where it has none."""
        if self.text_encoders:
            return Prompts(self, self.declared.reader or self._encoder_names[0])
        return ClassPrompts(classes_of(self.denoiser.config, self.options))

    def scheduler(self) -> Any:
        return self.scheduler_class.from_config(self.scheduler_config)

    def noise_levels(self, steps: int, extent: Extent) -> NoiseLevels:
        """What its pipeline asks of the scheduler for so many steps and latents of this extent."""
        if self.declared.levels is not None and self.alphas_cumprod is None:
            return self.declared.levels(self, steps, extent)
        return NoiseLevels(mu=shift_by_tokens(self.scheduler_config, self.image_tokens(extent)))

    def image_tokens(self, extent: Extent) -> int:
        """Tokens of latents of this extent."""
        frames, height, width = extent
        return frames * (height // self.patch) * (width // self.patch)

    def shift(self, steps: int, extent: Extent) -> float:
        """How far sampling shifts the levels of a flow towards the noise, see `noise_levels`."""
        return shift_of(self.scheduler_config, self.noise_levels(steps, extent).mu)
