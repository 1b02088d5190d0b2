"""Tiny denoisers whose layers keep their own processors, with inputs and with what a family of
theirs would declare; seeded random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.attention.denoiser_traits import DenoiserTraits, JointTraits
from trainer.attention.extras import Extras
from trainer.attention.host import Host
from trainer.attention.sites import Site

TEXT_FIRST = DenoiserTraits(joint=(JointTraits("*", text_first=True),))
UNDECLARED = DenoiserTraits()


@dataclass(frozen=True)
class TinyJoint:
    """name: of diffusers' class; config and inputs: what it is made and called with."""

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    traits: DenoiserTraits = UNDECLARED

    def make(self, **changes: Any) -> Any:
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**(self.config | changes)).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):  # ones would hide a lost norm
                nn.init.normal_(parameter, mean=1.0, std=0.2)
        return model

    def call(self, model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        output = model(**self.inputs(), return_dict=False)[0]
        return torch.stack(list(output)) if isinstance(output, (list, tuple)) else output


def _packed(rows: int = 2, text: int = 8, axes: int = 3, **more: Any) -> dict[str, Any]:
    """A 4 x 4 grid of image tokens, as FLUX and its kin take it."""
    ids = torch.zeros(16, axes)
    ids[:, -2] = torch.arange(4).repeat_interleave(4)
    ids[:, -1] = torch.arange(4).repeat(4)
    return {
        "hidden_states": torch.randn(rows, 16, 4),
        "encoder_hidden_states": torch.randn(rows, text, 32),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, axes),
    } | more


def _sd3() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([5.0, 9.0]),
    }


def _qwen() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "timestep": torch.tensor([0.5, 0.2]),
        "img_shapes": [[(1, 4, 4)], [(1, 4, 4)]],
    }


def _z_image() -> dict[str, Any]:
    x = [torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8)]
    return {
        "x": x,
        "cap_feats": [torch.randn(8, 16), torch.randn(5, 16)],
        "t": torch.tensor([0.5, 0.2]),
    }


def _wan() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([5]),
    }


def _ltx() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 8, 8),
        "encoder_hidden_states": torch.randn(1, 4, 16),
        "timestep": torch.tensor([[5.0]]),
        "encoder_attention_mask": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


def _cog() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 8, 8),
        "timestep": torch.tensor([5]),
    }


def _hunyuan() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 1, 8, 8),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": torch.tensor([[1.0] * 9 + [0.0] * 3]),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([1000.0]),
        "timestep": torch.tensor([5]),
    }


_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}

JOINT_MODELS = {
    "sd3": TinyJoint(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        _sd3,
        DenoiserTraits(joint=(JointTraits("*.attn", text_first=False),)),
    ),
    "flux": TinyJoint(
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 32},
        lambda: _packed(pooled_projections=torch.randn(2, 32)),
        TEXT_FIRST,
    ),
    "flux2": TinyJoint(
        "Flux2Transformer2DModel",
        {**_FLUX, "timestep_guidance_channels": 256, "axes_dims_rope": [4, 4, 4, 4]},
        lambda: _packed(axes=4, guidance=torch.ones(2)),
        TEXT_FIRST,
    ),
    "chroma": TinyJoint(
        "ChromaTransformer2DModel",
        {
            **_FLUX,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
            "approximator_num_channels": 16,
        },
        lambda: _packed(attention_mask=torch.ones(2, 24, dtype=torch.bool)),
        TEXT_FIRST,
    ),
    "qwen_image": TinyJoint(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        _qwen,
        TEXT_FIRST,
    ),
    "z_image": TinyJoint(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        _z_image,
        DenoiserTraits(
            joint=(JointTraits("layers.*", text_first=False, counts="image", multiple=32),),
            patch=2,
        ),
    ),
    "wan": TinyJoint(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        _wan,
        DenoiserTraits(layout="tokens", joint=()),
    ),
    "ltx": TinyJoint(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": 32,
            "num_layers": 1,
            "caption_channels": 16,
        },
        _ltx,
        DenoiserTraits(layout="tokens", joint=()),
    ),
    "cogvideox": TinyJoint(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 8,
        },
        _cog,
        DenoiserTraits(layout="tokens", joint=(JointTraits("*.attn1", text_first=True),)),
    ),
    "hunyuan_video": TinyJoint(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        _hunyuan,
        DenoiserTraits(
            layout="tokens",
            joint=(
                JointTraits("transformer_blocks.*", text_first=False),
                JointTraits("single_transformer_blocks.*", text_first=False),
            ),
        ),
    ),
}


class JointBackbone:
    """A tiny denoiser as methods see a backbone; it has no text encoder."""

    denoiser_name = "transformer"

    def __init__(self, name: str) -> None:
        self.case = JOINT_MODELS[name]
        self.denoiser = self.case.make()
        self.extras = Extras()
        self.sampling_hooks: dict[str, Any] = {}
        self.input_channels: dict[str, Any] = {}
        self.further_conditions: dict[str, Any] = {}
        self.given_frames = None
        self.text_encoders: dict[str, Any] = {}
        self.tokenizers: dict[str, Any] = {}

    @property
    def host(self) -> Host:
        return Host.attach(self.denoiser, self.case.traits)

    @property
    def sites(self) -> list[Site]:
        return self.host.sites

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.denoiser.named_parameters():
            yield f"{self.denoiser_name}.{name}", parameter
        for name, parameter in self.extras.named_parameters():
            yield f"extras.{name}", parameter

    def requires_grad_(self, requires_grad: bool = True) -> None:
        self.denoiser.requires_grad_(requires_grad)

    def output(self) -> Tensor:
        return self.case.call(self.denoiser)
