"""`comfyui` and `diff`: low-rank pairs and full deltas under the names that ComfyUI reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.export.cannot_carry import CannotCarryError
from trainer.export.export import export
from trainer.export.find_format import find_format
from trainer.export.formats import comfyui
from trainer.export.formats.kohya import read
from trainer.export.import_ import import_file
from trainer.export.probe import LIMIT


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("name", ["lora", "pissa", "custom", "projections", "full"])
def test_comfyui_carries_pairs_and_full_deltas(
    name: str, written: Any, bundle_of: Any, tiny: Any, same: Any
) -> None:
    out, _ = written(name, "comfyui")
    same(read(out, tiny), bundle_of(name), tiny)


@pytest.mark.parametrize("name", ["lora", "dora", "custom"])
def test_diff_carries_everything_as_full_deltas(
    name: str, written: Any, bundle_of: Any, tiny: Any, same: Any
) -> None:
    out, _ = written(name, "diff")
    kinds = {key.partition(".")[2] for key in load_file(out / "my_dog.safetensors")}
    assert kinds == {"diff"}
    same(read(out, tiny), bundle_of(name), tiny)


def test_custom_diffusion_comes_back_as_it_was(
    trained: Any, written: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """With full matrices the adapter has the same tensors; the tokens are in the files' order."""
    from trainer.config.header import read_header

    out, _ = written("custom", "comfyui")
    back = import_file(out, str(tiny_folder), tmp_path / "back", say=quiet)
    tree, _ = read_header(back)
    assert tree["methods"] == {
        "selective": {"sites": "cross", "projections": ["k", "v"]},
        "new_token": {"tokens": ["sks", "<v1>"]},
    }
    own, other = load_file(trained("custom")), load_file(back)
    assert own.keys() == other.keys()
    for key in own:
        if "rows" not in key:
            torch.testing.assert_close(own[key], other[key], rtol=0, atol=1e-7)


def test_dora_is_refused_in_favour_of_diff(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format=comfyui cannot carry DoRA.*; format=diff, "):
        export(trained("dora"), tmp_path / "out", "comfyui")
    assert list(tmp_path.iterdir()) == []


def test_a_pixart_transformer_has_names(
    pixart: Any, job_of: Any, read_back: Callable[..., dict[str, float]], tmp_path: Path, same: Any
) -> None:
    job = job_of(pixart, {"lora": {"sites": "all", "rank": 2, "alpha": 3, "layers": ["*ff.net.2"]}})
    differences = read_back("comfyui", job, tmp_path / "out")
    assert max(differences.values()) <= LIMIT
    tensors = load_file(tmp_path / "out" / "title.safetensors")
    key = "transformer.transformer_blocks.1.attn2.to_k"
    assert tensors[f"{key}.lora_A.weight"].shape == (2, 16)
    delta = job.bundle.layers[key]
    torch.testing.assert_close(tensors[f"{key}.lora_B.weight"], delta.up * 1.5)
    assert not any("alpha" in name for name in tensors)
    same(read(tmp_path / "out", job.base), job.bundle, job.base)


def test_biases_of_fused_layers_are_written_with_the_whole_layer(
    pixart: Any, job_of: Callable[..., Any], read_back: Any, tmp_path: Path, same: Any
) -> None:
    """ComfyUI keeps q, k, v in one layer; its loader finds no slice of a bias."""
    job = job_of(pixart, {"selective": {"sites": "all", "projections": ["k"]}})
    assert max(read_back("comfyui", job, tmp_path / "out").values()) <= LIMIT
    tensors = load_file(tmp_path / "out" / "title.safetensors")
    changed = {path: delta.weight for path, delta in job.bundle.layers.items()}
    k = changed["transformer.transformer_blocks.1.attn1.to_k"]
    qkv = tensors["diffusion_model.blocks.1.attn.qkv.diff"]
    torch.testing.assert_close(qkv, torch.cat([torch.zeros_like(k), k, torch.zeros_like(k)]))
    bias = job.bundle.layers["transformer.transformer_blocks.1.attn2.to_k"].bias
    kv = tensors["diffusion_model.blocks.1.cross_attn.kv_linear.diff_b"]
    torch.testing.assert_close(kv, torch.cat([bias, torch.zeros_like(bias)]))
    assert not [key for key in tensors if not key.startswith("diffusion_model.")]
    same(read(tmp_path / "out", job.base), job.bundle, job.base)


@pytest.mark.parametrize("name", ["comfyui", "diff"])
def test_a_pixart_all_of_whose_weights_were_trained(
    name: str, pixart: Any, job_of: Callable[..., Any], read_back: Any, tmp_path: Path
) -> None:
    """Also the tables of shifts and scales, which belong to no layer."""
    job = job_of(pixart, {"full": {}})
    assert not job.bundle.dropped
    assert max(read_back(name, job, tmp_path / "out").values()) <= LIMIT
    tensors = load_file(tmp_path / "out" / "title.safetensors")
    table = "scale_shift_table"
    for key, path in (
        (f"blocks.1.{table}", f"transformer_blocks.1.{table}"),
        (f"final_layer.{table}", table),
    ):
        change = job.bundle.bare[f"transformer.{path}"]
        assert change.abs().max() > 0
        torch.testing.assert_close(tensors[f"diffusion_model.{key}.diff"], change)
    for other in ("peft", "kohya", "custom_diffusion"):
        with pytest.raises(CannotCarryError):
            find_format(other).refuse(job)


def test_a_network_it_has_no_names_for_is_refused(
    sana: Any, job_of: Callable[..., Any], tmp_path: Path
) -> None:
    job = job_of(sana, {"lora": {"sites": "all", "rank": 2}})
    with pytest.raises(ValueError, match="ComfyUI has no name for it in a SanaTransformer2DModel"):
        comfyui.write(job, tmp_path, torch.float32)
