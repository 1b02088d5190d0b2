"""One step of a denoiser with random weights, dense, with each method that reduces attention, and
with tools of others: FLOP, time, peak memory, and how near the output is."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _networks import Network
from linear_swap import geometry
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.attention.context import StepContext, use
from trainer.attention.host import Host
from trainer.attention.rows import Rows
from trainer.backbones.families import find_family
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods

HEADS = 2  # of 8, in the narrowed geometry of Stable Diffusion 1.5
PAIR = ("target/uncond", "target/cond")
STEPS, FIRST = 20, 10  # of the sampler, and the first step that is timed
DRIFT = 0.05  # by which the latents of random weights change from step to step
Tree = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """One way to run a step. tree: methods of ours; other: patches a bare denoiser; span: steps
    after which what it keeps for several of them is made anew."""

    tree: Tree | None = None
    other: Callable[[Any], None] | None = None
    span: int = 1


def _tomesd(denoiser: Any) -> None:
    import tomesd

    tomesd.apply_patch(denoiser, ratio=0.5)


def _pyramid(denoiser: Any) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(denoiser, config)


WAYS: dict[str, Way] = {
    "dense": Way({}),
    "tome 25 %": Way({"tome": {"ratio": 0.25}}),
    "tome 50 %": Way({"tome": {"ratio": 0.5}}),
    "tome 50 %, proportional": Way({"tome": {"ratio": 0.5, "proportional": True}}),
    "tome 60 %": Way({"tome": {"ratio": 0.6}}),
    "tome 75 %": Way({"tome": {"ratio": 0.75}}),
    "toma 50 %": Way({"toma": {"ratio": 0.5}}, span=5),
    "toma 75 %": Way({"toma": {"ratio": 0.75}}, span=5),
    "circle of radius 8": Way({"flashmask": {"mask": "circle", "size": 8, "tile": 16}}),
    "tiles of 16 x 16": Way({"flashmask": {"mask": "sliding_tiles", "tile": 16, "reach": 0}}),
    "shared over steps": Way({"ditfastattn": {"pattern": ["full", "reuse"]}}, span=2),
    "shared over guidance": Way({"ditfastattn": {"pattern": ["half"]}}),
    "tomesd 50 %": Way(other=_tomesd),
    "diffusers' pyramid attention broadcast": Way(other=_pyramid, span=2),
}
OF_UNET_ALONE = ("circle", "tiles", "shared", "tomesd")  # the joint transformer has text among it


def network_of(kind: str) -> Network:
    """`unet`: Stable Diffusion 1.5's blocks, narrowed; `joint`: blocks as Stable Diffusion 3's."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    if kind == "unet":
        return Network(UNet2DConditionModel(**geometry(HEADS)), "unet")
    made = SD3Transformer2DModel(
        sample_size=96, patch_size=1, in_channels=4, out_channels=4, num_layers=4,
        attention_head_dim=64, num_attention_heads=4, joint_attention_dim=192,
        caption_projection_dim=256, pooled_projection_dim=64, pos_embed_max_size=96,
    )  # fmt: skip
    return Network(made, "transformer")


class ReducedStep:
    """The steps of one span, for two rows, without a prompt and with one."""

    def __init__(self, kind: str, name: str, side: int) -> None:
        self.way, self.network = WAYS[name], network_of(kind)
        generator = torch.Generator().manual_seed(0)
        width = 192
        self.x_t, self.drift = torch.randn(2, 1, 4, side, side, generator=generator)
        self.text = torch.randn(2, 77, width, generator=generator)
        self.pooled = torch.randn(2, 64, generator=generator) if kind == "joint" else None
        if self.way.other is not None:
            self.way.other(self.network.denoiser)
        else:
            self._apply(kind)

    def _apply(self, kind: str) -> None:
        if kind == "joint":
            Host.attach(self.network.denoiser, find_family("sd3").traits)
        self.network.sampling_hooks = {}
        self.network.given_frames = None
        tree = self.way.tree or {}
        if kind == "joint":
            tree = {name: {**options, "sites": "joint"} for name, options in tree.items()}
        apply_methods(self.network, methods_of(tree) if tree else {}, trains=False)
        for hooks in self.network.sampling_hooks.values():
            for hook in hooks:
                if hook.open is not None:
                    hook.open(SimpleNamespace(steps=STEPS, groups=PAIR))

    @torch.no_grad()
    def __call__(self, span: int | None = None) -> Tensor:
        """The output of the last of its steps, or of so many, (2, 4, side, side)."""
        for step in range(FIRST, FIRST + (span or self.way.span)):
            t = torch.tensor(500)
            more = {} if self.pooled is None else {"pooled_projections": self.pooled}
            ctx = StepContext(step, STEPS, t, groups=Rows.of(PAIR, 1))
            with use(ctx):
                x_t = (self.x_t + DRIFT * (step - FIRST) * self.drift).repeat(2, 1, 1, 1)
                output = self.network.denoiser(
                    x_t, timestep=t.expand(2), encoder_hidden_states=self.text, **more
                ).sample
        found: Tensor = output
        return found


def flop_of(step: ReducedStep) -> float:
    """FLOP of matrix products, convolutions and attention in a step of its span."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        step()
    return counter.get_total_flops() / step.way.span


def _attention_flop(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of q k^T and its product with v, from shapes (b, h, n, d)."""
    rows, heads, queries, width = q
    return 2 * rows * heads * queries * k[2] * (width + v[3])


def psnr(a: Tensor, b: Tensor) -> float:
    """Of two outputs, in dB of the range of the first."""
    error = float((a - b).square().mean())
    return float(10 * torch.log10((a.max() - a.min()) ** 2 / max(error, 1e-12)))


def peak_megabytes(kind: str, name: str, side: int) -> float:
    """What a step takes above the network, in a process of its own."""
    line = [sys.executable, __file__, kind, name, str(side)]
    done = subprocess.run(
        line, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    one = ReducedStep(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
