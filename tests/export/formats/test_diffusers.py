"""`diffusers`: what `load_lora_weights` and `load_textual_inversion` read from the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.export.bundle import Bundle, DoRADelta, LowRankDelta
from trainer.export.export import export
from trainer.export.formats import diffusers as form
from trainer.export.import_ import import_file
from trainer.export.peft_fields import strength
from trainer.export.probe import LIMIT, Probe, difference
from trainer.export.tokens import write_tokens

PLAIN = pytest.mark.parametrize("name", ["lora", "mlp", "pissa", "dora", "custom"])


@pytest.mark.sampled(2)
@PLAIN
def test_read_back_by_the_stock_loader_and_by_us(
    same: Any, name: str, written: Any, bundle_of: Any, tiny: Any
) -> None:
    out, said = written(name, "diffusers")
    assert said[0].startswith("this format is for diffusers: ComfyUI and Forge load such a file by")
    carried = {"dora": "format=diff"}.get(name, "format=comfyui or format=kohya or format=diff")
    assert said[0].endswith(f"for UIs export with {carried}")
    assert said[1].startswith("diffusers, read back by load_lora_weights: ")
    assert said[2].startswith("the call in README.md gives a picture; ")
    assert "load such a file by half" in (out / "README.md").read_text()
    same(form.read(out, tiny), bundle_of(name), tiny)


@pytest.mark.sampled(2)
@PLAIN
def test_comes_back_as_an_adapter(
    same: Any, name: str, written: Any, bundle_of: Any, tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    from trainer.export.extract import extract
    from trainer.runs.adapter import load_adapted

    out, _ = written(name, "diffusers")
    path = import_file(out, str(tiny_folder), tmp_path / "back", say=lambda line: None)
    back = extract(load_adapted(path)[0], tiny, load_file(path))
    same(back, bundle_of(name), tiny)


def test_the_scale_is_in_b_and_the_header_is_small(trained: Any, written: Any) -> None:
    out, _ = written("lora", "diffusers")
    own = load_file(trained("lora"))
    with safe_open(out / form.FILE, "pt") as file:
        fields = json.loads(file.metadata()[form.METADATA])
        layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        torch.testing.assert_close(
            file.get_tensor(f"unet.{layer}.lora_B.weight"),
            own[f"unet.{layer}.lora_B.lora.weight"] * 6 / 4,
        )
    assert fields["unet.r"] == fields["unet.lora_alpha"] == 4
    assert {key.partition(".")[2] for key in fields} == {
        "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"
    }  # fmt: skip
    ranks = load_file(out / form.FILE)
    short = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert len(ranks[short]) == 2


def test_a_reader_without_the_header_sees_the_same(
    trained: Any, written: Any, tiny: Any, tmp_path: Path
) -> None:
    from trainer.runs.adapter import load_adapted

    out, _ = written("lora", "diffusers")
    save_file(load_file(out / form.FILE), tmp_path / "bare.safetensors")
    probe = Probe(tiny, ())
    wanted = probe(load_adapted(trained("lora"))[0])
    tiny.pipeline().load_lora_weights(tmp_path, weight_name="bare.safetensors")
    assert difference(probe(tiny), wanted) <= LIMIT


def test_every_word_has_a_file_that_windows_can_hold(written: Any) -> None:
    out, _ = written("custom", "diffusers")
    files = {path.name: list(load_file(path)) for path in (out / "embeddings").iterdir()}
    assert files == {"v1.safetensors": ["<v1>"], "sks.safetensors": ["sks"]}


def test_words_alone_make_no_lora_file(written: Any) -> None:
    out, _ = written("words", "diffusers")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "embeddings"]


def test_former_spellings_are_read(same: Any, bundle_of: Any, tiny: Any, tmp_path: Path) -> None:
    """`attn2.processor.to_k_lora.down` and the text encoder's `to_q_lora.down`."""
    bundle = bundle_of("text")
    tensors = {}
    for path, delta in bundle.layers.items():
        owner, _, last = path.rpartition(".")
        role = last.removesuffix("_proj").removeprefix("to_")
        middle = ".processor" if last.startswith("to_") else ""
        key = f"{owner}{middle}.to_{role}_lora"
        tensors |= {f"{key}.down.weight": delta.down, f"{key}.up.weight": delta.up * delta.scale}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "old")
    same(form.read(tmp_path / "old", tiny), bundle, tiny)


def test_alpha_in_the_header_is_the_strength(
    same: Any, bundle_of: Any, tiny: Any, tmp_path: Path
) -> None:
    bundle = bundle_of("pissa")
    tensors = {}
    for path, delta in bundle.layers.items():
        tensors |= {f"{path}.lora_A.weight": delta.down, f"{path}.lora_B.weight": delta.up / 2}
    names = sorted(path.partition(".")[2] for path in bundle.layers)
    fields = {"unet.r": 4, "unet.lora_alpha": 1, "unet.target_modules": names}
    fields["unet.alpha_pattern"] = dict.fromkeys(names, 8)
    save_file(tensors, tmp_path / "f", {form.METADATA: json.dumps(fields)})
    same(form.read(tmp_path / "f", tiny), bundle, tiny)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),  # alpha / sqrt(r), arXiv 2312.03732
        ({"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2}}, 2.0),
    ],
)
def test_the_factor_of_a_peft_configuration(fields: dict[str, Any], wanted: float) -> None:
    assert strength(fields, "unet.mid_block.attn2.to_k", 4) == wanted


def test_lora_and_dora_in_one_part_are_refused() -> None:
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    layers = {"a": LowRankDelta(down, up), "b": DoRADelta(down, up, torch.ones(4))}
    with pytest.raises(ValueError, match=r"LoRA and DoRA on different layers of unet cannot be in"):
        form.part_config("unet", layers)
    assert "use_dora" not in form.part_config("unet", {"a": layers["a"]})
    assert form.part_config("unet", {"b": layers["b"]})["use_dora"]


def test_names_that_differ_in_case_alone_have_files_of_their_own(tmp_path: Path) -> None:
    """Windows does not distinguish the case of file names."""
    rows = {word: {"text_encoder": torch.ones(3)} for word in ("<v1>", "<V1>", "v1")}
    write_tokens(Bundle({}, rows), tmp_path, torch.float32)
    files = {path.stem: list(load_file(path)) for path in (tmp_path / "embeddings").iterdir()}
    assert sorted(word for keys in files.values() for word in keys) == sorted(rows)
    assert len({name.lower() for name in files}) == 3


@pytest.mark.parametrize("name", ["full", "projections"])
def test_a_bias_is_refused(name: str, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format=diffusers cannot carry the trained bias of unet"):
        export(trained(name), tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_two_text_encoders(
    same: Any,
    sdxl: Any,
    job_of: Callable[..., Any],
    read_back: Callable[..., dict[str, float]],
    tmp_path: Path,
) -> None:
    tree = {
        "lora": {"sites": "all", "rank": 2, "alpha": 3, "text_encoder": ["q", "v"]},
        "new_token": {"tokens": ["<v1>"], "init": "fox"},
    }
    job = job_of(sdxl, tree)
    assert max(read_back("diffusers", job, tmp_path / "out").values()) <= LIMIT
    assert set(load_file(tmp_path / "out" / "embeddings" / "v1.safetensors")) == {
        "clip_l",
        "clip_g",
    }
    same(form.read(tmp_path / "out", job.base), job.bundle, job.base)


def test_a_transformer_whose_pipeline_loads_lora(
    sana: Any, job_of: Callable[..., Any], read_back: Callable[..., dict[str, float]]
) -> None:
    job = job_of(sana, {"lora": {"sites": "all", "rank": 2, "alpha": 3}})
    assert read_back("diffusers", job) == {"load_lora_weights": pytest.approx(0, abs=LIMIT)}


def test_a_pipeline_without_a_loader_is_named(
    pixart: Any, job_of: Callable[..., Any], tmp_path: Path
) -> None:
    job = job_of(pixart, {"lora": {"sites": "all", "rank": 2}})
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline loads none there$"):
        form.write(job, tmp_path, torch.float32)
