"""The proof of an export: what is asked, and how small a difference must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.backbones.long_prompts import Prompts
from trainer.config.header import read_header
from trainer.export.export import export
from trainer.export.formats import kohya
from trainer.export.probe import LIMIT, Probe, difference
from trainer.export.proof import Proof, prove
from trainer.runs.adapter import save_adapter


def quiet(line: str) -> None:
    pass


def test_the_difference_is_the_largest_in_either_direction() -> None:
    one, other = torch.tensor([1.0, -2.0]), torch.tensor([1.5, 1.0])
    assert difference(one, other) == difference(other, one) == 3
    for broken in (torch.nan, torch.inf):
        assert difference(one, torch.tensor([1.0, broken])) == float("inf")


@pytest.mark.parametrize(("resolution", "side"), [(64, 8), (512, 16)])
def test_what_is_asked(resolution: int, side: int) -> None:
    prompts = Prompts(None)
    reads: dict[str, Any] = {"extras": {}, "input_channels": {}, "further_conditions": {}}
    size = {"resolution": resolution, "divisor": 8, "latent_channels": 4}
    model = SimpleNamespace(**size, **reads, prompts=prompts)
    images, clips = Probe(model, ["<v1>", "sks"]), Probe(model, [], 3)
    assert images.prompts == ["a photo of <v1> sks", ""]
    assert images.x_t.shape == (2, 4, side, side) and images.t.tolist() == [150, 700]
    assert clips.x_t.shape == (6, 4, side, side) and clips.ctx.frames == 3
    assert clips.t.tolist() == [150] * 3 + [700] * 3


def test_a_small_effect_must_be_met_within_a_tenth(
    tiny_folder: Path, open_folder: Any, job_of: Callable[..., Any], tmp_path: Path
) -> None:
    """The adapter changes the output by less than `LIMIT`, so a file without effect would be within
    it."""
    tree = {"lora": {"sites": "cross", "rank": 2}}
    job = job_of(lambda: open_folder(tiny_folder), tree)
    probe = Probe(job.adapted, ())
    pairs = [v for k, v in job.adapted.named_parameters() if ".lora_B." in k]
    with torch.no_grad():
        factor = 0.8 * LIMIT / difference(probe(job.adapted), probe(job.base))
        for value in pairs:
            value *= factor
    effect = difference(probe(job.adapted), probe(job.base))
    assert LIMIT / 2 < effect < LIMIT
    kohya.write(job, tmp_path, torch.float32)
    said: list[str] = []
    asked: list[Any] = []

    def counted(model: Any) -> Any:
        asked.append(model)
        return probe(model)

    wanted: Any = probe(job.adapted)
    proof = Proof("kohya", job.make_base, probe=cast(Any, counted), wanted=wanted, say=said.append)
    assert prove(proof, tmp_path) == effect
    assert len(asked) == 3  # the base, and what two readers make
    assert len(said) == 2 and all("(allowed 2e-06; the adapter" in line for line in said)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({key: value * 0 for key, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"differs by \S+ from the model's, and 2e-06 is allowed"):
        prove(proof, tmp_path)


def test_values_beyond_the_range_of_the_dtype_are_refused(trained: Any, tmp_path: Path) -> None:
    tree, identity = read_header(trained("pissa"))
    large = {
        key: value * (1e6 if ".lora_B." in key else 1e-6)
        for key, value in load_file(trained("pissa")).items()
    }
    save_adapter(tmp_path / "a.safetensors", large, tree=tree, identity=identity)
    with pytest.raises(ValueError, match=r"dtype=float16: some values are .*; use dtype=bfloat16"):
        export(tmp_path / "a.safetensors", tmp_path / "out", "peft", dtype="float16", say=quiet)
    assert not (tmp_path / "out").exists()
    export(tmp_path / "a.safetensors", tmp_path / "out", "peft", dtype="bfloat16", say=quiet)
