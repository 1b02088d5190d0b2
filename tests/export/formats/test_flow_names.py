"""Adapters of transformers on a flow under the names of ComfyUI, sd-scripts and musubi-tuner: every
weight, as our reader and diffusers' own converters find it. `bench/flow_readers.py` asks the tools
themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as stock
from flow_folders import clip_parts, t5_parts
from joint_models import JOINT_MODELS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.export.bundle import Bundle, Form, FullDelta, LowRankDelta
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.card import Card
from trainer.export.find_format import find_format
from trainer.export.job import Job
from trainer.export.layer_names import comfy, comfy_parameters, kohya, kohya_fused
from trainer.export.read_layers import read_layers
from trainer.export.read_names import Names
from trainer.export.side_by_side import apart, side_by_side

FAMILIES = ("sd3", "flux", "flux2", "chroma", "qwen_image", "z_image", "wan", "ltx")
NOT_NAMED = {  # linear layers that ComfyUI's loader has no name for, or another order of rows
    "sd3": {"norm_out.linear", "norm1_context.linear"},
    "flux": {"norm_out.linear"},
    "chroma": {"distilled_guidance_layer"},
    "flux2": {"norm_out.linear", "modulation", "time_guidance_embed"},
}


def base_of(denoiser: Any, **text_encoders: Any) -> Any:
    """The attributes of a backbone that exports use."""
    return SimpleNamespace(
        name="tiny", target="flow", denoiser_name="transformer", denoiser=denoiser.float().eval(),
        text_encoders=text_encoders,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bases() -> Any:
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            made[name] = base_of(JOINT_MODELS[name].make())
        return made[name]

    return make


def layer_at(base: Any, path: str) -> Any:
    part, _, name = path.partition(".")
    own = base.denoiser if part == "transformer" else base.text_encoders[part]
    return own.get_submodule(name)


def lora(base: Any, paths: Any, scale: float = 0.5) -> dict[str, LowRankDelta]:
    """Random pairs; of rank 3 for queries and 2 for all else."""
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for path in sorted(paths):
        rows, *width = layer_at(base, path).weight.shape
        rank = 3 if path.endswith("to_q") else 2
        down = torch.randn(rank, *width, generator=generator)
        up = torch.randn(rows, rank, *[1] * (len(width) - 1), generator=generator)
        layers[path] = LowRankDelta(down, up, scale)
    return layers


def named(base: Any, format_name: str) -> set[str]:
    if format_name == "comfyui":
        return set(comfy(base))
    return {*kohya(base), *(path for paths in kohya_fused(base).values() for path in paths)}


def written(base: Any, format_name: str, folder: Path, bundle: Bundle) -> dict[str, Tensor]:
    job = Job(base, lambda: base, (), title="lora", given=bundle, card=Card())
    find_format(format_name).write(job, folder, torch.float32)
    return load_file(folder / "lora.safetensors")


def product(delta: Any) -> Tensor:
    found: Tensor = delta.scale * (delta.up.flatten(1) @ delta.down.flatten(1))
    return found


@pytest.mark.parametrize("format_name", ["comfyui", "kohya"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_named_layer_is_written_and_read(
    name: str, format_name: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(name)
    paths = named(base, format_name)
    if (name, format_name) == ("ltx", "kohya"):
        assert not paths
        return
    layers = lora(base, paths)
    found = read_layers(written(base, format_name, tmp_path, Bundle(layers, {})), base).layers
    assert found.keys() == layers.keys() and len(layers) > 10
    for path, delta in layers.items():
        own = found[path]
        assert isinstance(own, LowRankDelta) and own.rank == delta.rank
        torch.testing.assert_close(product(own), product(delta), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_comfyui_has_a_name_for_every_linear_layer_but_these(name: str, bases: Any) -> None:
    base = bases(name)
    linear = [n for n, m in base.denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    lost = {each for each in linear if f"transformer.{each}" not in comfy(base)}
    assert all(any(part in each for part in NOT_NAMED.get(name, ())) for each in lost)
    keys = comfy(base).values()
    assert len(set(keys)) == len(keys)


def probed(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """dW on a few random inputs, for layers whose dW is large."""
    down, up = down.flatten(1).double(), up.flatten(1).double()
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(down.shape[1], 3, generator=generator, dtype=torch.float64)
    return scale * (up @ (down @ x))


def same_as_stock(converted: dict[str, Tensor], layers: dict[str, LowRankDelta]) -> None:
    assert {key.partition(".lora_")[0] for key in converted} == set(layers)
    for path, delta in layers.items():
        found = probed(converted[f"{path}.lora_A.weight"], converted[f"{path}.lora_B.weight"])
        torch.testing.assert_close(
            found, probed(delta.down, delta.up, delta.scale), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("parts", [("to_q", "to_k", "to_v", "proj_mlp", "to_out.0"), ("to_k",)])
def test_diffusers_reads_files_of_flux_in_the_names_of_sd_scripts(
    parts: tuple[str, ...], tmp_path: Path
) -> None:
    """Its converter has the published widths in it, so that these are a FLUX of two blocks."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    base = base_of(denoiser)
    paths = [path for path in named(base, "kohya") if path.endswith(parts)]
    layers = lora(base, paths)
    tensors = written(base, "kohya", tmp_path, Bundle(layers, {}))
    assert any("single_blocks_0_linear1.lora_up" in key for key in tensors)
    converted = stock._convert_kohya_flux_lora_to_diffusers(tensors)
    rest = {key: value for key, value in converted.items() if key.partition(".lora_")[0] in layers}
    same_as_stock(rest, layers)
    others = [value for key, value in converted.items() if key not in rest and "lora_B" in key]
    assert not any(bool(value.any()) for value in others)  # rows of a fused layer without a change


CONVERTERS: dict[tuple[str, str], Any] = {
    ("qwen_image", "kohya"): stock._convert_non_diffusers_qwen_lora_to_diffusers,
    ("z_image", "kohya"): stock._convert_non_diffusers_z_image_lora_to_diffusers,
    ("flux2", "kohya"): stock._convert_kohya_flux2_lora_to_diffusers,
    ("wan", "kohya"): stock._convert_musubi_wan_lora_to_diffusers,
    ("wan", "comfyui"): stock._convert_non_diffusers_wan_lora_to_diffusers,
}


@pytest.mark.parametrize(("name", "format_name"), CONVERTERS)
def test_diffusers_converters_find_the_same_layers(
    name: str, format_name: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(name)
    layers = lora(base, named(base, format_name))
    tensors = written(base, format_name, tmp_path, Bundle(layers, {}))
    converted = CONVERTERS[name, format_name](tensors)
    same_as_stock(converted, layers)


def test_a_fused_layer_has_the_matrices_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        LowRankDelta(torch.randn(2, 5, generator=generator), torch.randn(rows, 2), 0.5)
        for rows in (3, 4)
    ]
    whole = side_by_side([pairs[0], None, pairs[1]], [3, 2, 4])
    wanted = torch.cat([product(pairs[0]), torch.zeros(2, 5), product(pairs[1])])
    torch.testing.assert_close(product(whole), wanted)
    assert [each.rank for each in apart(whole, [3, 2, 4])] == [2, 1, 2]
    common = [LowRankDelta(pairs[0].down, pair.up, pair.scale) for pair in pairs]
    assert side_by_side(common, [3, 4]).rank == 2
    torch.testing.assert_close(
        product(side_by_side(common, [3, 4])), torch.cat([product(each) for each in common])
    )


def test_text_encoders_are_counted_as_the_tools_count_them(bases: Any, tmp_path: Path) -> None:
    """FLUX has CLIP as the first and T5 as the third; where T5 is alone, ComfyUI has it first."""
    _, clip = clip_parts("CLIPTextModel")
    _, t5 = t5_parts()
    flux = base_of(JOINT_MODELS["flux"].make(), text_encoder=clip, text_encoder_2=t5)
    layers = lora(flux, [path for path in kohya(flux) if path.startswith("text_encoder")])
    for format_name in ("kohya", "comfyui"):
        folder = tmp_path / format_name
        folder.mkdir()
        tensors = written(flux, format_name, folder, Bundle(layers, {}))
        starts = {key.split("_")[1] for key in tensors}
        assert starts == {"te1", "te3"}
        assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight" in tensors
        assert any(key.startswith("lora_te1_text_model_encoder_layers_0_") for key in tensors)
        found = read_layers(tensors, flux).layers
        assert found.keys() == layers.keys()
    names = Names(flux)
    q = ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",)
    assert (
        names.find("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q") == q
    )
    chroma = base_of(JOINT_MODELS["chroma"].make(), text_encoder=t5)
    assert any(key.startswith("lora_te1_encoder_block") for key in comfy(chroma).values())
    assert not any(path.startswith("text_encoder") for path in kohya(chroma))


@pytest.mark.parametrize(
    ("name", "format_name", "path", "why"),
    [
        ("ltx", "kohya", "transformer_blocks.0.attn1.to_q", "neither sd-scripts nor musubi-tuner"),
        ("cogvideox", "comfyui", "transformer_blocks.0.attn1.to_q", "ComfyUI has no name for it"),
        ("flux", "kohya", "x_embedder", "sd-scripts adapts layers inside its blocks only"),
        ("flux", "comfyui", "norm_out.linear", "ComfyUI has no name for it"),
        ("sd3", "comfyui", "transformer_blocks.1.norm1_context.linear", "ComfyUI has no name"),
    ],
)
def test_what_has_no_name_is_refused(
    name: str, format_name: str, path: str, why: str, bases: Any
) -> None:
    base = bases(name)
    bundle = Bundle(lora(base, [f"transformer.{path}"]), {})
    job = Job(base, lambda: base, (), title="lora", given=bundle)
    with pytest.raises(CannotCarryError, match=why) as refused:
        find_format(format_name).refuse(job)
    assert f"format={format_name} cannot carry transformer.{path}" in str(refused.value)


def test_loha_of_a_part_of_a_fused_layer_is_refused(bases: Any) -> None:
    base, path = bases("flux"), "transformer.transformer_blocks.0.attn.to_q"
    form = Form("loha", {})
    bundle = Bundle({path: FullDelta(torch.zeros(32, 32))}, {}, forms={path: form})
    job = Job(base, lambda: base, (), title="lora", given=bundle)
    with pytest.raises(
        CannotCarryError, match=r"loha of .*to_q: .* keep it and others as one layer"
    ):
        find_format("kohya").refuse(job)


@pytest.mark.parametrize(
    ("name", "paths", "key"),
    [
        ("flux", ["transformer_blocks.0.attn.add_k_proj"], "double_blocks.0.txt_attn.qkv"),
        ("flux", ["single_transformer_blocks.0.proj_mlp"], "single_blocks.0.linear1"),
        ("sd3", ["transformer_blocks.0.attn2.to_v"], "joint_blocks.0.x_block.attn2.qkv"),
    ],
)
def test_biases_are_written_with_the_whole_fused_layer(
    name: str, paths: list[str], key: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(name)
    layers = {}
    for path in [f"transformer.{each}" for each in paths]:
        layer = layer_at(base, path)
        layers[path] = FullDelta(torch.randn(layer.weight.shape), torch.randn(layer.bias.shape))
    tensors = written(base, "comfyui", tmp_path, Bundle(layers, {}))
    assert set(tensors) == {f"diffusion_model.{key}.diff", f"diffusion_model.{key}.diff_b"}
    found = read_layers(tensors, base).layers
    for path, delta in layers.items():
        own = found[path]
        assert isinstance(own, FullDelta) and own.weight is not None and own.bias is not None
        assert torch.equal(own.weight, delta.weight) and torch.equal(own.bias, delta.bias)


def test_parameters_of_no_layer_are_named_as_the_model_does(bases: Any) -> None:
    wan, ltx, z_image = (comfy_parameters(bases(name)) for name in ("wan", "ltx", "z_image"))
    assert wan["transformer.blocks.1.scale_shift_table"] == "diffusion_model.blocks.1.modulation"
    assert wan["transformer.scale_shift_table"] == "diffusion_model.head.modulation"
    name = "transformer_blocks.0.scale_shift_table"
    assert ltx[f"transformer.{name}"] == f"diffusion_model.{name}"
    assert z_image["transformer.x_pad_token"] == "diffusion_model.x_pad_token"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("z_image", "diffusion_model.layers.0.attention.qkv"),
        ("z_image", "lora_unet_layers_0_attention_qkv"),
        ("flux", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
        ("qwen_image", "lora_transformer_transformer_blocks_0_attn_to_q"),
    ],
)
def test_layers_of_other_tools_are_found(name: str, key: str, bases: Any, tmp_path: Path) -> None:
    """A file that a tool has trained on its fused layer: one `down` for all rows."""
    base = bases(name)
    paths = Names(base).find(key)
    assert paths is not None
    rows = [len(layer_at(base, path).weight) for path in paths]
    width = layer_at(base, paths[0]).weight.shape[1]
    down, up = torch.randn(2, width), torch.randn(sum(rows), 2)
    file = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    save_file(file | {f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    found = find_format("kohya").read
    assert found is not None
    bundle = found(tmp_path / "a.safetensors", base)
    whole = torch.cat([product(bundle.layers[path]) for path in paths])
    torch.testing.assert_close(whole, 0.5 * up @ down)


@pytest.mark.parametrize(
    ("name", "config", "version", "architecture"),
    [
        ("sd3", {"qk_norm": None}, "3-medium", "stable-diffusion-3-3-medium"),
        ("sd3", {"qk_norm": "rms_norm", "dual_attention_layers": ()}, "3-5-large", None),
        ("sd3", {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, "3-5-medium", None),
        ("flux", {"guidance_embeds": True}, "flux1", "flux-1-dev"),
        ("flux", {"guidance_embeds": False}, "flux1", "flux-1-schnell"),
        ("chroma", {}, "chroma", "chroma"),
        ("flux2", {"num_attention_heads": 24}, "flux_2_klein_4b", "Flux.2-klein-4b"),
        ("flux2", {"num_attention_heads": 32}, "flux_2_klein_9b", "Flux.2-klein-9b"),
        ("qwen_image", {}, "qwen_image", "Qwen-Image"),
        ("z_image", {}, "z_image", "Z-Image"),
        ("wan", {}, "wan", "wan2.1"),
    ],
)
def test_the_header_calls_the_model_what_its_tool_does(
    name: str, config: dict[str, Any], version: str, architecture: str | None, tmp_path: Path
) -> None:
    """`ss_base_model_version` of sd-scripts (`MODEL_VERSION_FLUX_V1`, the `model_type` of SD3) and
    of musubi-tuner (`ARCHITECTURE_..._FULL`), and `modelspec.architecture` of both."""
    base = base_of(JOINT_MODELS[name].make())
    base.denoiser.register_to_config(**config)
    layers = lora(base, sorted(kohya(base))[:1])
    written(base, "kohya", tmp_path, Bundle(layers, {}))
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == version
    wanted = architecture or f"stable-diffusion-3-{version}"
    assert header["modelspec.architecture"] == f"{wanted}/lora"
