"""The tables of names, on the full sizes of SD 1.5 and SDXL, built without weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.export.bundle import Bundle, FullDelta, LowRankDelta
from trainer.export.card import Card
from trainer.export.find_format import find_format
from trainer.export.layer_names import clip_name, comfy, kohya, ldm
from trainer.export.read_names import Names

SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS = {"sd15": SD15, "sdxl": SDXL}
each_geometry = pytest.mark.parametrize("geometry", CONFIGS)


@pytest.fixture(scope="module")
def built() -> Any:
    """`built("sdxl")`: the attributes of a backbone that exports use, with its U-Net on the meta
    device."""
    from diffusers import UNet2DConditionModel

    made: dict[str, Any] = {}

    def build(geometry: str) -> Any:
        if geometry not in made:
            with torch.device("meta"):
                unet = UNet2DConditionModel(**CONFIGS[geometry])
            made[geometry] = SimpleNamespace(
                name=geometry, target="eps", denoiser_name="unet", denoiser=unet, text_encoders={}
            )
        return made[geometry]

    return build


def cross_kv(model: Any) -> dict[str, Any]:
    named = model.denoiser.named_modules()
    return {
        f"unet.{name}": layer
        for name, layer in named
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    }


@pytest.mark.parametrize(
    ("geometry", "layers", "parameters"), [("sd15", 32, 19_169_280), ("sdxl", 140, 340_787_200)]
)
def test_cross_k_and_v(geometry: str, layers: int, parameters: int, built: Any) -> None:
    found = cross_kv(built(geometry))
    assert (len(found), sum(item.weight.numel() for item in found.values())) == (layers, parameters)


@pytest.mark.parametrize(("geometry", "count"), [("sd15", 192), ("sdxl", 722)])
def test_sd_scripts_counts_as_many_layers(geometry: str, count: int, built: Any) -> None:
    """Its own log: "create LoRA for U-Net: 192 modules", and 722 for SDXL, convolutions aside."""
    assert sum(".attentions." in path for path in kohya(built(geometry))) == count


@each_geometry
def test_every_linear_and_convolution_layer_has_a_comfyui_name(geometry: str, built: Any) -> None:
    model = built(geometry)
    keys = comfy(model)
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
    layers = {f"unet.{n}" for n, m in model.denoiser.named_modules() if isinstance(m, kinds)}
    assert layers == set(keys)
    assert len(set(keys.values())) == len(keys)
    names = Names(model)
    assert all(names.find(key) == (path,) for path, key in keys.items())


def test_older_block_names_are_diffusers_own_reading(built: Any) -> None:
    """diffusers turns sd-scripts' SDXL keys into its own; so must our table, layer by layer. Not
    on SD 1.5, where it takes block 10 for block 1."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils import convert_unet_state_dict_to_peft

    model = built("sdxl")
    keys, older = kohya(model), ldm(model.denoiser)
    table = {name: old for name, old in older.items() if f"unet.{name}" in keys}
    file, wanted = {}, {}
    for number, (name, old) in enumerate(table.items()):
        for half, letter in (("down", "A"), ("up", "B")):
            value = torch.tensor([number])
            file[f"lora_unet_{old.replace('.', '_')}.lora_{half}.weight"] = value
            wanted[f"unet.{name}.lora_{letter}.weight"] = number
    mapped = _maybe_map_sgm_blocks_to_diffusers(file, model.denoiser.config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    found = convert_unet_state_dict_to_peft(converted)
    assert {key: int(value) for key, value in found.items()} == wanted


@pytest.mark.parametrize(
    ("geometry", "name", "old"),
    [
        ("sd15", "conv_in", "input_blocks.0.0"),
        ("sd15", "down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
        ("sd15", "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("sd15", "down_blocks.3.resnets.1.time_emb_proj", "input_blocks.11.0.emb_layers.1"),
        ("sd15", "mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("sd15", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("sd15", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("sd15", "up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
        ("sdxl", "add_embedding.linear_2", "label_emb.0.2"),
        (
            "sdxl",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k",
        ),
        ("sdxl", "mid_block.attentions.0.norm", "middle_block.1.norm"),
        ("sdxl", "up_blocks.2.resnets.0.norm1", "output_blocks.6.0.in_layers.0"),
    ],
)
def test_older_names_by_hand(geometry: str, name: str, old: str, built: Any) -> None:
    assert ldm(built(geometry).denoiser)[name] == old


def test_older_names_of_blocks_of_unequal_depth() -> None:
    """The first up block mirrors the last down block, so its residual blocks are steps 0 to 2."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=(1, 2), norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
    found = ldm(unet)
    assert found["up_blocks.0.resnets.2.conv1"] == "output_blocks.2.0.in_layers.2"
    assert found["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert found["up_blocks.1.resnets.0.conv1"] == "output_blocks.3.0.in_layers.2"
    assert found["down_blocks.1.resnets.1.conv1"] == "input_blocks.4.0.in_layers.2"


@pytest.mark.parametrize("name", ["kohya", "comfyui"])
@each_geometry
def test_files_of_low_rank_pairs(geometry: str, name: str, built: Any, tmp_path: Path) -> None:
    model = built(geometry)
    layers = {}
    for path, layer in cross_kv(model).items():
        out, width = layer.weight.shape
        layers[path] = LowRankDelta(torch.zeros(4, width), torch.ones(out, 4), 0.5)
    job = SimpleNamespace(base=model, bundle=Bundle(layers, {}), title="lora", card=Card())
    find_format(name).write(job, tmp_path, torch.float16)
    path = tmp_path / "lora.safetensors"
    tensors = load_file(path)
    assert len(tensors) == 3 * len(layers)
    assert tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.alpha"] == 2
    values = sum(4 * sum(layer.weight.shape) for layer in cross_kv(model).values())
    assert 0 < path.stat().st_size - 2 * values < 2 * len(layers) * 250
    if name == "kohya":
        version = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[geometry]
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_base_model_version"] == version


def test_a_file_of_full_matrices_of_sd15(built: Any, tmp_path: Path) -> None:
    model = built("sd15")
    layers = {
        path: FullDelta(torch.zeros(layer.weight.shape)) for path, layer in cross_kv(model).items()
    }
    job = SimpleNamespace(base=model, bundle=Bundle(layers, {}), title="custom")
    find_format("comfyui").write(job, tmp_path, torch.float16)
    path = tmp_path / "custom.safetensors"
    keys = list(load_file(path))
    assert len(keys) == 32
    assert all(key.endswith((".diff",)) for key in keys)
    assert 0 < path.stat().st_size - 2 * 19_169_280 < 10_000


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("encoder.layers.3.self_attn.q_proj", "text_model.encoder.layers.3.self_attn.q_proj"),
        ("text_model.encoder.layers.0.mlp.fc2", "text_model.encoder.layers.0.mlp.fc2"),
        ("encoder.block.0.layer.0.SelfAttention.q", None),
        ("encoder.layers.0.layer_norm1", None),
    ],
)
def test_clip_names(name: str, wanted: str | None) -> None:
    assert clip_name("text_encoder", name) == wanted
