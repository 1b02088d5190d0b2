"""What every backbone is: one denoiser, text encoders, a VAE and a scheduler, and what its family
declares of them. A family is a file beside this one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext, current, use
from trainer.attention.extras import Extras
from trainer.attention.further_conditions import FurtherCondition
from trainer.attention.given_frames import GivenFrames
from trainer.attention.hooks import SamplingHook
from trainer.attention.host import Host
from trainer.attention.input_channels import InputChannels
from trainer.attention.op_conflicts import refuse_recompute
from trainer.attention.sites import Site, scan
from trainer.backbones import vae
from trainer.backbones.backbone_facts import BackboneFacts
from trainer.backbones.family import Encoder, Family, Parts, tokenizer_name
from trainer.backbones.folder_check import PREDICTION_TYPES
from trainer.backbones.gradient_checkpointing import (
    Recompute,
    checkpoint_denoiser,
    checkpoint_layers,
)
from trainer.backbones.layout import clips_to_rows, rows_to_clips
from trainer.backbones.long_prompts import Prompts
from trainer.backbones.module_digests import contents, shapes
from trainer.backbones.pipeline_folder import limit_length
from trainer.backbones.resting import awake

COMPILED_SHAPES = 8  # of a function that blocks share, for each block: widths, grids, batches


class Backbone(BackboneFacts):
    """denoiser(x_t, t, text) with text (b, tokens, d), on latents (b, c, H/f, W/f) of a VAE.

    Parameter names start with `denoiser_name`, the name of a text encoder as in `text_encoder.`,
    `vae.` or, of modules that methods have registered, `extras.`, as adapters store them. The parts
    are attributes by their names in a pipeline folder: `text_encoder_2`, `tokenizer_2`.
    """

    text_encoder: Any  # of several the first, as `tokenizer`; not there where it has none
    tokenizer: Any
    max_tokens: int | None = None  # of a prompt that are read; None for those of one call
    published = torch.float32  # what the denoiser's weights are stored in, where they come from
    computes_in = torch.float32  # see `device.place`

    def __init__(self, name: str, family: str, declared: Family, parts: Parts) -> None:
        super().__init__()
        self.name, self.family, self.declared = name, family, declared
        self.folder, self.options = parts.folder, dict(parts.options)
        self.prompt_lengths = dict(parts.prompt_lengths)
        self.denoiser_name = declared.denoiser
        self.add_module(self.denoiser_name, parts.denoiser)
        self._encoder_names = tuple(parts.text_encoders)
        for part, encoder in parts.text_encoders.items():
            setattr(self, part, encoder)
            setattr(self, tokenizer_name(part), parts.tokenizers[part])
            limit_length(parts.tokenizers[part], encoder)
        self.vae: Any = parts.vae
        # kept here, since previews, `sample`, `evaluate` and a later run get the backbone alone
        self.extras = Extras()
        self.sampling_hooks: dict[str, tuple[SamplingHook, ...]] = {}
        self.input_channels: dict[str, InputChannels] = {}
        self.further_conditions: dict[str, FurtherCondition] = {}
        self.given_frames: GivenFrames | None = None
        self.at_rest = set()
        self.encoders: dict[str, Encoder] = dict(declared.encoders)
        self.scheduler_config = dict(parts.scheduler.config)
        self.scheduler_class = type(parts.scheduler)
        flow = isinstance(parts.scheduler, FlowMatchEulerDiscreteScheduler)
        # None: trained on the flow path x_t = (1 - t) x0 + t noise
        self.alphas_cumprod: Tensor | None = (
            None if flow else parts.scheduler.alphas_cumprod.clone()
        )
        self.target = "flow" if flow else PREDICTION_TYPES[parts.scheduler.config.prediction_type]
        self.published_target = (self.target, flow)  # and path; `retarget` changes the first only
        self._identity = {
            "family": family,
            "name": name,
            self.denoiser_name: shapes(parts.denoiser),
            **{part: shapes(encoder) for part, encoder in parts.text_encoders.items()},
            "target": self.target,
        }

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {part: getattr(self, tokenizer_name(part)) for part in self._encoder_names}

    @cached_property
    def host(self) -> Host:
        return Host.attach(self.denoiser, self.declared.traits)

    @property
    def sites(self) -> list[Site]:
        return self.host.sites

    @property
    def hooks(self) -> tuple[SamplingHook, ...]:
        """What its methods do while it is sampled, in the order in which they were applied."""
        return tuple(hook for hooks in self.sampling_hooks.values() for hook in hooks)

    @torch.no_grad()
    def moments(self, pixels: Tensor, frames: int = 1) -> Tensor:
        """Pixels (b f, 3, H, W) in [-1, 1] to the posterior's mean and log-variance (b f', 2c, h,
        w), in fp32 wherever they are asked for: a training step asks under autocast. Clips have
        `frames` adjacent rows, f, and f' latent frames, fewer where the VAE compresses time."""
        self.clip_frames.check(frames)
        with self._without_autocast(), awake(self, ["vae"]):
            return vae.encoded(self.vae, pixels, self.declared.latents, frames=frames)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample (b, c, h, w) from the posterior, scaled to what the denoiser was trained on."""
        mean, log_variance = moments.chunk(2, dim=1)
        sampled = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return vae.scale_latents(self.vae, sampled, self.declared.latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int = 1) -> Tensor:
        """Latents (b f', c, h, w) to pixels (b f, 3, H, W) in [-1, 1], in fp32 as `moments`; the
        clips of a VAE that compresses time have `frames` latent frames, f'."""
        with self._without_autocast(), awake(self, ["vae"]):
            found = vae.decoded(self.vae, latents, self.declared.latents, frames=frames)
        return found.clamp(-1, 1)

    def _without_autocast(self) -> AbstractContextManager[Any]:
        if self.computes_in == torch.float32:  # nobody has it on, and not every device knows it
            return nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def tokens(self, prompts: Sequence[str], part: str = "text_encoder") -> Any:
        """Prompts to input_ids and attention_mask (b parts, n), the parts of a prompt adjacent, for
        the text encoder called `part`."""
        return Prompts(self, part).tokens(prompts).to(self.text_encoders[part].device)

    def joined(self, parts: Tensor) -> Tensor:
        """What a text encoder makes of parts of prompts (b parts, n, ...), in a row (b, n, ...)."""
        return parts.unflatten(0, (-1, self.prompts.parts)).flatten(1, 2)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of b prompts alone."""
        return self.encode({"text": prompts})

    def encode(
        self, inputs: Mapping[str, Any], instead: Mapping[str, Encoder] | None = None
    ) -> Condition:
        """What the denoiser is told of the inputs, by the encoders of their names; each input has a
        value for every row. instead: encoders in the place of its own.

        Raises:
            ValueError: an input that has no encoder, or a field that two encoders give.
        """
        found: dict[str, Tensor] = {}
        owners: dict[str, str] = {}
        for name, values in inputs.items():
            if name not in self.encoders:
                raise ValueError(
                    f"backbone {self.name} has no encoder for the input {name!r}; it has "
                    f"{', '.join(self.encoders)}"
                )
            encoder = (instead or {}).get(name)
            parts = self._encoder_names if encoder is None else ()
            with self.computing(), awake(self, parts):
                given = (encoder or self.encoders[name])(self, values)
            for item in given:
                if (other := owners.setdefault(item, name)) != name:
                    raise ValueError(f"the encoders of {other!r} and {name!r} both give {item}")
            found |= given
        return Condition(**found)  # type: ignore[arg-type]  # an encoder gives tensors alone

    def inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """The denoiser's own arguments for x_t (b, c, h, w) at timesteps t (b,) and a condition
        for each row, whatever its `layout`: the step context says how many frames a clip has."""
        if condition.channels is not None:
            x_t = torch.cat([x_t, condition.channels.to(x_t)], dim=1)
        ctx = current()
        frames = 1 if ctx is None else ctx.frames
        if self.layout == "tokens":
            x_t, t = rows_to_clips(x_t, frames), t[::frames] if t.ndim else t
            condition = condition.per_clip(frames)
        return self.declared.inputs(self, x_t, t, condition=condition)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output (b, c, h, w) at x_t (b, c, h, w) and timesteps t (b,). A learned
        variance in further channels is left out."""
        own, ctx = self.declared.output, current()
        with self.computing(), self.calling(x_t, t):
            output: Tensor = self.denoiser(**self.inputs(x_t, t, condition)).sample
        if own is not None:
            frames = 1 if ctx is None else ctx.frames
            as_called = rows_to_clips(x_t, frames) if self.layout == "tokens" else x_t
            output = own(self, output, as_called)
        if self.layout == "tokens":
            output = clips_to_rows(output)
        if self.computes_in != torch.float32:
            output = output.to(x_t.dtype)
        return output if output.shape[1] <= x_t.shape[1] else output[:, : x_t.shape[1]]

    def calling(self, x_t: Tensor, t: Tensor) -> AbstractContextManager[Any]:
        """The context that a call of the denoiser with x_t (b, c, h, w) needs. Inside, groups of
        rows are groups of clips, where the denoiser has clips for rows; and the size of the latents
        is known, where the denoiser gets tokens, which have none."""
        ctx, packed = current(), self.declared.output is not None
        if ctx is None:
            if not packed:
                return nullcontext()
            ctx = StepContext(0, 1, t, training=self.denoiser.training)
        elif not packed and self.layout == "rows":
            return nullcontext()
        if self.layout == "tokens":
            given = None if ctx.condition is None else ctx.condition.per_clip(ctx.frames)
            ctx = replace(ctx, groups=ctx.groups.of_clips(ctx.frames), condition=given)
        return use(replace(ctx, latent_size=(x_t.shape[-2], x_t.shape[-1])) if packed else ctx)

    def computing(self) -> AbstractContextManager[Any]:
        """The denoiser and the text encoders compute in their precision inside; in fp32, as
        whoever calls them has it."""
        if self.computes_in == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.computes_in)

    def identity(self) -> dict[str, str]:
        """What an adapter was trained on: the family and the shapes of the parts, as they were
        before any edit."""
        return dict(self._identity)

    def include_adapter(self, adapter: Path) -> None:
        """Makes the adapter of an earlier run, already loaded, part of the identity."""
        with adapter.open("rb") as file:
            both = hashlib.file_digest(file, "sha256")
        both.update(self._identity.get("adapters", "").encode())
        self._identity = {**self._identity, "adapters": both.hexdigest()[:16]}

    def vae_fingerprint(self) -> str:
        """Changes with any weight of the VAE; keys cached latents."""
        return contents(self.vae)

    def fingerprint(self) -> str:
        """Changes with any weight; keys the pictures the backbone has generated."""
        return hashlib.sha256(
            " ".join(
                map(contents, (self.denoiser, *self.text_encoders.values(), self.vae))
            ).encode()
        ).hexdigest()[:16]

    def enable_gradient_checkpointing(self, how: Recompute | None = None) -> None:
        """In the denoiser, and in text encoders of which something trains. how: all blocks where it
        is not given.

        Raises:
            ValueError: an op hands tensors from one block to another, or there is nothing to
            calculate again.
        """
        how = how or Recompute()
        if not how.feed_forward:
            refuse_recompute(op for hosted in self.host.processors.values() for op in hosted.ops)
        checkpoint_denoiser(self.denoiser, how)
        for encoder in self.text_encoders.values():
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                checkpoint_layers(encoder, how)

    def compile_blocks(self, required: bool = True) -> None:
        """torch.compile for each block of the denoiser separately; hooks on it stay Python.
        required: False where a function that torch cannot compile runs as it is.

        Shapes are static: blocks share their code, and with dynamic shapes inductor fails on it. So
        a function that many blocks share is compiled once for each shape they have, more often than
        torch allows by default: beyond its limit it would run what is left uncompiled.
        """
        from torch._dynamo import config as dynamo  # imported here: it takes a second

        blocks = self.blocks()
        limit = COMPILED_SHAPES * len(blocks)
        dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
        dynamo.suppress_errors = not required
        for block in blocks:
            block.compile(dynamic=False)

    def blocks(self) -> list[Any]:
        """The blocks of the denoiser in forward order."""
        found: list[Any] = []
        for name in self.declared.blocks:
            block = self.denoiser.get_submodule(name)
            found += block if isinstance(block, nn.ModuleList) else [block]
        return found

    def pipeline(self) -> Any:
        """The parts as a stock pipeline; they are shared, not copied.

        Raises:
            ValueError: diffusers has none of such parts.
        """
        if self.declared.pipeline is None:
            raise ValueError(
                f"backbone {self.name}: diffusers has no pipeline of the parts of the family "
                f"{self.family}, so nothing could load exported files; generate with `python -m "
                "trainer sample adapter=...`, and train on with backbone=<the run>"
            )
        return self.declared.pipeline(self)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside are a function of `seed`, and those after are as if there had been none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def zero_outputs(denoiser: nn.Module) -> None:
    """Every attention layer adds nothing: its output projection is 0, weight and bias."""
    for site in scan(denoiser):
        for parameter in site.projection("out").parameters():
            nn.init.zeros_(parameter)
