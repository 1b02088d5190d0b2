"""Motion modules of a model as a `MotionAdapter` of diffusers, and that adapter in an
`AnimateDiffPipeline`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from trainer.attention.anatomy import is_unet
from trainer.attention.condition import Condition
from trainer.attention.context import current
from trainer.attention.insertion import insertions
from trainer.ops.adapters.inject import fold
from trainer.ops.temporal.layers import MotionModule

# the layers of a motion module to which diffusers passes the input by keyword
NAMED = ("proj_in", "proj_out")


def carries_motion(model: Any) -> bool:
    """Whether all inserted layers are motion modules of a U-Net, which is what a `MotionAdapter`
    can hold, and an `AnimateDiffPipeline` has its text encoder, one."""
    if len(model.text_encoders) > 1:
        return False
    blocks = [found.block for found in insertions(model.denoiser)]
    return is_unet(model.denoiser) and all(isinstance(block, MotionModule) for block in blocks)


def modules(model: Any) -> dict[str, MotionModule]:
    """The motion modules by their paths in the denoiser."""
    named = model.denoiser.named_modules()
    return {name: module for name, module in named if isinstance(module, MotionModule)}


@torch.no_grad()
def tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a `MotionAdapter` by its names: adapters inside the modules are folded in, and
    4-bit layers are unpacked."""
    found: dict[str, Tensor] = {}
    for path, module in modules(model).items():
        alone = nn.Sequential(copy.deepcopy(module))
        fold(alone)
        found |= {f"{path}.{name}": value for name, value in alone[0].state_dict().items()}
    return found


def motion_config(model: Any) -> dict[str, Any]:
    """The arguments of a `MotionAdapter` for the model's modules."""
    unet, found = model.denoiser.config, modules(model)
    one = next(iter(found.values()))
    return {
        "block_out_channels": list(unet.block_out_channels),
        "motion_layers_per_block": unet.layers_per_block,
        "motion_num_attention_heads": one.num_attention_heads,
        "motion_norm_num_groups": one.norm.num_groups,
        "motion_max_seq_length": one.max_frames,
        "use_motion_mid_block": any(path.startswith("mid_block.") for path in found),
    }


def adapter(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model's modules as a `MotionAdapter`."""
    with torch.device("meta"):
        made: Any = MotionAdapter(**motion_config(model))
    made.load_state_dict({k: v.to(dtype) for k, v in tensors(model).items()}, assign=True)
    return made


@contextmanager
def framewise(model: Any) -> Iterator[None]:
    """Inside the block, the motion modules normalise each frame separately instead of all frames of
    a clip together."""
    found = list(modules(model).values())
    before = [module.per_frame for module in found]
    for module in found:
        module.per_frame = True
    try:
        yield
    finally:
        for module, own in zip(found, before, strict=True):
            module.per_frame = own


def is_per_frame(model: Any) -> bool:
    """Whether the model's motion modules normalise each frame separately."""
    return any(module.per_frame for module in modules(model).values())


class AnimateDiffModel:
    """The parts of `base` in an `AnimateDiffPipeline` with a `MotionAdapter`, with the `predict` of
    a backbone: the rows are (b f), the frames of a clip adjacent.

    The pipeline shares the text encoder of `base`, and so what it loads into it.
    """

    def __init__(self, base: Any, motion_adapter: Any) -> None:
        fold(base)  # the pipeline copies the weights of plain layers only
        stock = base.pipeline()
        parts = {name: stock.components[name] for name in ("vae", "text_encoder", "tokenizer")}
        pipeline: Any = AnimateDiffPipeline(
            **parts, unet=base.denoiser, motion_adapter=motion_adapter, scheduler=stock.scheduler
        )
        self._take(pipeline, base)

    @classmethod
    def around(cls, pipeline: Any, base: Any) -> AnimateDiffModel:
        """A pipeline that exists, asked with the text encoder and tokenizer of `base`."""
        made = cls.__new__(cls)
        made._take(pipeline, base)
        return made

    def _take(self, pipeline: Any, base: Any) -> None:
        pipeline.unet.eval()
        self.pipeline = pipeline
        self.encode_prompts = base.encode_prompts

    def to(self, device: torch.device) -> AnimateDiffModel:
        """Moves the pipeline's parts, which are those of `base`."""
        self.pipeline.to(device)
        return self

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output (b f, c, h, w), with the frames a clip has in the current step."""
        ctx = current()
        frames = 1 if ctx is None else ctx.frames
        clips = x_t.unflatten(0, (-1, frames)).transpose(1, 2)  # b c f h w
        output: Tensor = self.pipeline.unet(clips, t[::frames], condition.tokens).sample
        return output.transpose(1, 2).flatten(0, 1)


class FrameNorm(nn.Module):
    """Applies the group norm of a motion module of diffusers to each frame separately, as
    AnimateDiff's own code does; x (b, c, f, h, w)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.norm(x.transpose(1, 2).flatten(0, 1))
        return rows.unflatten(0, (len(x), -1)).transpose(1, 2)


def as_released(pipeline: Any) -> None:
    """Makes the motion modules of a pipeline of diffusers normalise as AnimateDiff's own code."""
    found: list[Any] = [
        module for module in pipeline.unet.modules() if isinstance(module, AnimateDiffTransformer3D)
    ]
    for module in found:
        module.norm = FrameNorm(module.norm)
