"""`custom_diffusion`: what `load_attn_procs` reads from the file, which has an entry of length zero
for every layer that did not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from trainer.export.export import export
from trainer.export.formats import custom_diffusion as form
from trainer.export.import_ import import_file
from trainer.export.probe import LIMIT, Probe, difference


def quiet(line: str) -> None:
    pass


def test_read_back(written: Any, bundle_of: Any, tiny: Any, same: Any) -> None:
    out, _ = written("custom", "custom_diffusion")
    tensors = load_file(out / form.FILE)
    empty = {key for key, value in tensors.items() if not value.numel()}
    assert empty == {key for key in tiny.unet.attn_processors if ".attn1." in key}
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
    assert tensors[key].shape == (32, 128)
    same(form.read(out, tiny), bundle_of("custom"), tiny)


def test_the_documented_call_changes_nothing_and_ours_does(written: Any, tiny: Any) -> None:
    out, _ = written("custom", "custom_diffusion")
    probe = Probe(tiny, ())
    base = probe(tiny)
    tiny.unet.load_attn_procs(out, weight_name=form.FILE)
    assert difference(probe(tiny), base) == 0
    tiny.unet.load_attn_procs(out, weight_name=form.FILE, _pipeline=tiny.pipeline())
    assert difference(probe(tiny), base) > LIMIT


def test_comes_back_as_an_adapter(written: Any, tiny_folder: Path, tmp_path: Path) -> None:
    from trainer.config.header import read_header

    out, _ = written("custom", "custom_diffusion")
    back = import_file(out, str(tiny_folder), tmp_path / "back", say=quiet)
    methods = read_header(back)[0]["methods"]
    assert methods["selective"] == {"sites": "cross", "projections": ["k", "v"]}


@pytest.mark.parametrize("name", ["lora", "projections"])
def test_anything_else_is_refused(name: str, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds full matrices of cross-attention only"):
        export(trained(name), tmp_path / "out", "custom_diffusion")
    assert list(tmp_path.iterdir()) == []
