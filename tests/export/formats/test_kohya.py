"""`kohya`: sd-scripts' keys, one alpha, its header; read by us and by diffusers' own reading."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.export.bundle import Bundle, LowRankDelta
from trainer.export.card import Card
from trainer.export.export import export
from trainer.export.formats import kohya as form
from trainer.export.import_ import import_file
from trainer.export.probe import LIMIT, Probe, difference

MIDDLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def quiet(line: str) -> None:
    pass


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["lora", "text", "mlp", "pissa", "custom"])
def test_read_by_diffusers_and_by_us(
    name: str, written: Any, bundle_of: Any, tiny: Any, same: Any
) -> None:
    out, said = written(name, "kohya")
    assert [re.split(r":| \d", line)[0] for line in said] == [
        "kohya, read back by sd-scripts' key rules",
        "kohya, read back by load_lora_weights",
        "the call in README.md gives a picture; largest difference",
    ]
    same(form.read(out, tiny), bundle_of(name), tiny)


def test_comes_back_as_an_adapter(
    written: Any, bundle_of: Any, tiny: Any, tiny_folder: Path, tmp_path: Path, same: Any
) -> None:
    from trainer.export.extract import extract
    from trainer.runs.adapter import load_adapted

    out, _ = written("lora", "kohya")
    path = import_file(out, str(tiny_folder), tmp_path / "back", say=quiet)
    same(extract(load_adapted(path)[0], tiny, load_file(path)), bundle_of("lora"), tiny)


def test_keys_and_one_alpha(written: Any) -> None:
    """Versions of diffusers keep one alpha and one rank of a file: all layers have the alpha that
    most of them had, and the largest rank."""
    out, _ = written("lora", "kohya")
    tensors = load_file(out / "my_dog.safetensors")
    assert {key.partition(".")[2] for key in tensors} == {
        "lora_down.weight", "lora_up.weight", "alpha"
    }  # fmt: skip
    assert {float(value) for key, value in tensors.items() if key.endswith("alpha")} == {6.0}
    assert tensors[f"{MIDDLE}.lora_down.weight"].shape[0] == 4
    rarer = MIDDLE.replace("attn2_to_k", "attn1_to_q")
    assert tensors[f"{rarer}.lora_down.weight"].shape[0] == 4
    assert tensors[f"{rarer}.lora_down.weight"][2:].abs().max() == 0
    assert tensors[f"{rarer}.lora_up.weight"][:, 2:].abs().max() == 0
    text = "lora_te_text_model_encoder_layers_0_self_attn_v_proj.lora_down.weight"
    assert tensors[text].shape[0] == 4
    conv = tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"]
    assert conv.shape[2:] == (3, 3)


def test_the_header_says_what_readers_look_for(written: Any) -> None:
    out, _ = written("pissa", "kohya")
    path = out / "my_dog.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert header["modelspec.title"] == "my_dog"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert header["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


@pytest.mark.parametrize(
    ("width", "target", "version", "architecture", "prediction"),
    [
        (768, "eps", "sd_v1", "stable-diffusion-v1", "epsilon"),
        (1024, "eps", "sd_v2", "stable-diffusion-v2-512", "epsilon"),
        (1024, "v", "sd_v2_768_v", "stable-diffusion-v2-768-v", "v"),
        (2048, "eps", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "epsilon"),
    ],
)
def test_the_header_names_the_base_model(
    width: int, target: str, version: str, architecture: str, prediction: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8,), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=width,
        )  # fmt: skip
    base = SimpleNamespace(
        name="x", target=target, denoiser_name="unet", denoiser=unet, text_encoders={}
    )
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layers = {path: LowRankDelta(torch.ones(2, width), torch.ones(8, 2))}
    bundle = Bundle(layers, {})
    job: Any = SimpleNamespace(base=base, bundle=bundle, title="title", card=Card())
    form.write(job, tmp_path, torch.float32)
    with safe_open(tmp_path / "title.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == version
    assert header["ss_v2"] == str(width == 1024)
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert header["modelspec.prediction_type"] == prediction


def test_a_text_encoder_without_output_projections_gets_one_of_zeros(
    written: Any, tmp_path: Path
) -> None:
    """Without any, diffusers cannot tell the spelling of the others."""
    out, _ = written("text", "kohya")
    tensors = load_file(out / "my_dog.safetensors")
    zeros = [key for key, value in tensors.items() if not value.any()]
    stem = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    assert sorted(zeros) == [f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"]
    bare = {key: value for key, value in tensors.items() if not key.startswith(stem)}
    save_file(bare, tmp_path / "bare.safetensors")
    from diffusers import StableDiffusionPipeline

    tensors, _ = StableDiffusionPipeline.lora_state_dict(tmp_path / "bare.safetensors")
    from diffusers.utils import convert_state_dict_to_peft

    text = {key: value for key, value in tensors.items() if key.startswith("text_encoder")}
    with pytest.raises(ValueError, match="Could not automatically infer"):
        convert_state_dict_to_peft(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("dora", "DoRA: readers of dora_scale .*; format=diff, .*carry it", id="dora"),
        pytest.param("full", "the trained bias of unet", id="full"),
    ],
)
def test_what_it_cannot_carry_is_refused(
    name: str, message: str, trained: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"format=kohya cannot carry {message}"):
        export(trained(name), tmp_path / "out", "kohya")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_sd_scripts_would_skip_is_refused(
    tiny_folder: Path, open_folder: Any, job_of: Callable[..., Any], tmp_path: Path
) -> None:
    tree = {"lora": {"sites": "cross", "rank": 2, "layers": ["conv_in"]}}
    job = job_of(lambda: open_folder(tiny_folder), tree)
    with pytest.raises(ValueError, match=r"cannot carry unet\.conv_in: sd-scripts adapts only"):
        form.write(job, tmp_path, torch.float32)


def test_two_text_encoders(
    sdxl: Any, job_of: Any, read_back: Callable[..., dict[str, float]], tmp_path: Path, same: Any
) -> None:
    tree = {"lora": {"sites": "all", "rank": 2, "alpha": 3, "text_encoder": ["q", "out"]}}
    job = job_of(sdxl, tree)
    differences = read_back("kohya", job, tmp_path / "out")
    assert len(differences) == 2
    assert max(differences.values()) <= LIMIT
    tensors = load_file(tmp_path / "out" / "title.safetensors")
    assert {key.split("_")[1] for key in tensors} == {"unet", "te1", "te2"}
    same(form.read(tmp_path / "out", job.base), job.bundle, job.base)


def test_block_names_of_the_older_code_are_read(
    bundle_of: Any, written: Any, tiny: Any, tmp_path: Path, same: Any
) -> None:
    """sd-scripts trains SDXL under `input_blocks_...`."""
    from trainer.export.layer_names import ldm

    out, _ = written("lora", "kohya")
    older = {
        f"lora_unet_{name.replace('.', '_')}": f"lora_unet_{other.replace('.', '_')}"
        for name, other in ldm(tiny.unet).items()
    }
    renamed = {}
    for key, value in load_file(out / "my_dog.safetensors").items():
        stem, _, kind = key.partition(".")
        renamed[f"{older.get(stem, stem)}.{kind}"] = value
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.alpha" in renamed
    assert not any("down_blocks" in key for key in renamed)
    save_file(renamed, tmp_path / "older.safetensors")
    same(form.read(tmp_path / "older.safetensors", tiny), bundle_of("lora"), tiny)


def test_half_precision_is_proven_first_and_then_rounded(
    trained: Any, tiny: Any, tmp_path: Path
) -> None:
    from trainer.runs.adapter import load_adapted

    said: list[str] = []
    out = export(trained("lora"), tmp_path / "out", "kohya", dtype="bfloat16", say=said.append)
    assert len(said) == 4
    assert said[-2].startswith("rounded to bfloat16, read back by sd-scripts' key rules: largest")
    tensors = load_file(out / "out.safetensors")
    assert {v.dtype for k, v in tensors.items() if not k.endswith("alpha")} == {torch.bfloat16}
    assert {v.dtype for k, v in tensors.items() if k.endswith("alpha")} == {torch.float32}
    probe = Probe(tiny, ())
    wanted = probe(load_adapted(trained("lora"))[0])
    assert LIMIT < difference(probe(form.by_rules(out, tiny)), wanted) < 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["loha", "lokr", "full_lokr"])
def test_lycoris_reads_loha_and_lokr(
    name: str, trained: Any, tiny: Any, tiny_folder: Path, open_folder: Any, tmp_path: Path
) -> None:
    """In its own form, by its own loader; and our import makes the same adapter of the file."""
    lycoris = pytest.importorskip("lycoris.kohya")
    from foreign.case import live
    from lycoris.config import PRESET

    from trainer.ops.adapters.inject import fold
    from trainer.runs.adapter import load_adapted

    out = export(trained(name), tmp_path / "out", "kohya", say=quiet)
    with safe_open(out / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == "lycoris.kohya"
        assert any(".hada_w1_a" in key or ".lokr_w1" in key for key in file.keys())  # noqa: SIM118
    adapted = load_adapted(trained(name))[0]
    changed = [n for n, _ in adapted.named_parameters() if n.endswith("base_layer.weight")]
    for part in (adapted.unet, adapted.text_encoder):
        fold(part)
    stock = open_folder(tiny_folder)
    # it names a text encoder's layers as transformers 4 does
    encoder = torch.nn.ModuleDict({"text_model": stock.text_encoder})
    lycoris.LycorisNetworkKohya.apply_preset(PRESET["attn-only"])
    network, _ = lycoris.create_network_from_weights(
        1.0, str(out / "out.safetensors"), None, encoder, stock.unet
    )
    network.apply_to(encoder, stock.unet, True, True)
    network.eval()
    for path in (own.removesuffix(".base_layer.weight") for own in changed):
        weight, _ = live(stock.get_submodule(path))
        wanted = adapted.get_submodule(path).weight
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6, msg=path)
    back = import_file(out, str(tiny_folder), tmp_path / "back", say=quiet)
    again, tree = load_adapted(back)
    assert tree["methods"]["peft_adapter"]["type"] == name.removeprefix("full_")
    assert torch.allclose(Probe(tiny, ())(again), Probe(tiny, ())(adapted), atol=1e-5)
