"""Temporal blocks for a denoiser of images, inserted by `insert.py`. Each adds nothing at first, so
the model of clips starts as the image model on every frame.

Their inputs are the frames' features, (b f) c h w or (b f) n c; a pixel through time is a line,
(b n) f c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import (
    SinusoidalPositionalEmbedding,
    TimestepEmbedding,
    get_timestep_embedding,
)
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.attention.context import StepContext


WAVES = 256  # sines and cosines of a frame rate, as of a timestep


def pixel_sequences(x: Tensor, frames: int) -> Tensor:
    """(b f) c h w or (b f) n c -> (b n) f c"""
    tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    return tokens.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)


def from_pixel_sequences(y: Tensor, x: Tensor) -> Tensor:
    """(b n) f c -> the shape of x, from which `pixel_sequences` made it."""
    pixels = x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[1]
    tokens = y.unflatten(0, (-1, pixels)).transpose(1, 2).flatten(0, 1)  # (b f) n c
    return tokens.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else tokens


def zeroed(layer: nn.Module) -> None:
    """Sets weight and bias to zero: with either left the layer would add something."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def refuse_longer(frames: int, most: int, owner: str) -> None:
    if frames > most:
        raise ValueError(
            f"methods.{owner} has positions for {most} frames, and this clip has {frames}; give "
            f"methods.{owner}.max_frames={frames}, or shorter clips"
        )


class MotionModule(AnimateDiffTransformer3D):
    """AnimateDiff's motion module, diffusers' own class with its parameter names: group norm,
    proj_in, self-attention over frames twice, each with sines of the frame's number added to its
    input, GEGLU feed-forward, proj_out; all of it a residual, whose proj_out is zero here. The
    group norm is over all frames of a clip together, or over each by itself with `per_frame`.

    The forward is our own: diffusers' takes no tokens, and names an argument of its linear layers
    that adapters and 4-bit layers name differently.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        groups: int,
        max_frames: int,
        owner: str,
        per_frame: bool = False,
    ) -> None:
        super().__init__(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=width,
            norm_num_groups=groups,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=max_frames,
        )
        self.max_frames, self.owner, self.per_frame = max_frames, owner, per_frame
        zeroed(self.proj_out)

    def forward(self, x: Tensor, before: Tensor, ctx: StepContext) -> Tensor:  # type: ignore[override]
        refuse_longer(ctx.frames, self.max_frames, self.owner)
        rows = x.flatten(2) if x.ndim == 4 else x.transpose(1, 2)  # (b f) c n
        z = self.proj_in(self._normed(rows, ctx.frames))
        for block in self.transformer_blocks:
            z = block(z)
        return x + from_pixel_sequences(self.proj_out(z), x).to(x.dtype)

    def _normed(self, rows: Tensor, frames: int) -> Tensor:
        """(b f) c n -> (b n) f c"""
        # copies: channels last, PyTorch 2.13's group norm can crash in its backward on a CPU
        if self.per_frame:
            clips = self.norm(rows.contiguous()).unflatten(0, (-1, frames)).transpose(1, 2)
        else:
            clips = self.norm(rows.unflatten(0, (-1, frames)).transpose(1, 2).contiguous())
        return clips.permute(0, 3, 2, 1).flatten(0, 1)  # of b c f n


class TemporalAttention(nn.Module):
    """y = x + W_o attention(norm(z) + position) over the frames of each pixel, W_o and its bias 0.

    z is x, or with `parallel` the input of the module before, so that this attention runs beside
    that module, not after it. positions: sines of the frame's number, a learned vector for each, or
    none, where an op on the attention distinguishes frames.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        owner: str,
        positions: str | None = None,
        max_frames: int = 0,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.owner, self.max_frames, self.parallel = owner, max_frames, parallel
        self.norm = nn.LayerNorm(width)
        self.places = POSITIONS[positions](width, max_frames) if positions else None
        self.attn = Attention(query_dim=width, heads=heads, dim_head=width // heads)
        zeroed(self.attn.to_out[0])

    def forward(self, x: Tensor, before: Tensor, ctx: StepContext) -> Tensor:
        z = self.norm(pixel_sequences(before if self.parallel else x, ctx.frames))
        if self.places is not None:
            refuse_longer(ctx.frames, self.max_frames, self.owner)
            z = self.places(z)
        return x + from_pixel_sequences(self.attn(z), x).to(x.dtype)


class LearnedPositions(nn.Module):
    """A vector for each frame's number, added: (b n) f c."""

    def __init__(self, width: int, max_frames: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(max_frames, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]].to(x.dtype)


POSITIONS = {"sines": SinusoidalPositionalEmbedding, "learned": LearnedPositions}


class TemporalConv(nn.Module):
    """y = x + conv1d(x) over the frames of each pixel, its kernel and bias zero.

    The sum is one convolution whose kernel starts as a Dirac, the identity. Written as a sum, the
    identity is exact in every precision, and weight decay pulls towards it, not towards zero.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, size, padding=size // 2)
        zeroed(self.conv)

    def forward(self, x: Tensor, before: Tensor, ctx: StepContext) -> Tensor:
        mixed = self.conv(pixel_sequences(x, ctx.frames).transpose(1, 2)).transpose(1, 2)
        return x + from_pixel_sequences(mixed, x).to(x.dtype)


class FrameAdaptor(nn.Module):
    """y_i = (1 + s_i) x_i + b_i for frame i, channel by channel; s and b (max_frames, c) zero."""

    def __init__(self, width: int, max_frames: int, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.scale = nn.Parameter(torch.zeros(max_frames, width))
        self.shift = nn.Parameter(torch.zeros(max_frames, width))

    def forward(self, x: Tensor, before: Tensor, ctx: StepContext) -> Tensor:
        refuse_longer(ctx.frames, len(self.scale), self.owner)
        clips = x.unflatten(0, (-1, ctx.frames))
        scale, shift = (
            part[: ctx.frames, :, None, None] if x.ndim == 4 else part[: ctx.frames, None]
            for part in (self.scale, self.shift)
        )
        return x + (clips * scale + shift).flatten(0, 1).to(x.dtype)


class FrameRate(nn.Module):
    """y = x + W2 silu(W1 sines(frames a second)), for the embedding x (b f, d) of the timestep; W2
    and its bias zero. default: the rate where the context names none."""

    def __init__(self, width: int, default: float) -> None:
        super().__init__()
        self.default = default
        self.embedding = TimestepEmbedding(WAVES, width)
        zeroed(self.embedding.linear_2)

    def forward(self, x: Tensor, before: Tensor, ctx: StepContext) -> Tensor:
        fps = ctx.fps
        if fps is None:
            fps = torch.full((len(x) // ctx.frames,), self.default)
        if len(fps) * ctx.frames != len(x):
            raise ValueError(f"{len(fps)} frame rates for {len(x) // ctx.frames} clips; one each")
        waves = get_timestep_embedding(
            fps.to(x.device), WAVES, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        rate = self.embedding(waves.to(x.dtype))
        return x + rate.repeat_interleave(ctx.frames, 0).to(x.dtype)
