"""`peft`: what `PeftModel.from_pretrained` reads from the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from trainer.export.detect import detect
from trainer.export.formats import peft as form
from trainer.export.import_ import import_file
from trainer.export.probe import LIMIT


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("name", ["lora", "dora", "custom"])
def test_read_back(name: str, written: Any, bundle_of: Any, tiny: Any, same: Any) -> None:
    out, _ = written(name, "peft")
    read = form.read(out, tiny)
    same(read, bundle_of(name), tiny)
    assert read.notes == ()  # its configuration gives the factor, so no `.alpha` is missing


def test_dora_comes_back_as_dora(
    trained: Any, written: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    from trainer.config.header import read_header

    out, _ = written("dora", "peft")
    back = import_file(out, str(tiny_folder), tmp_path / "back", say=quiet)
    options = read_header(back)[0]["methods"]["dora"]
    assert (options["rank"], options["sites"], options["text_encoder"]) == (2, "cross", ["v"])
    assert load_file(back).keys() == load_file(trained("dora")).keys()


def test_a_folder_of_the_denoiser_alone(written: Any, bundle_of: Any, tiny: Any, same: Any) -> None:
    out, _ = written("pissa", "peft")
    assert detect(out) == detect(out / "unet") == "peft"
    same(form.read(out / "unet", tiny), bundle_of("pissa"), tiny)


def test_another_kind_of_adapter_is_refused(written: Any, tiny: Any, tmp_path: Path) -> None:
    out = shutil.copytree(written("pissa", "peft")[0], tmp_path / "out")
    config = out / "unet" / form.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "OFT"}))
    with pytest.raises(ValueError, match="peft_type is OFT; LORA, LOHA and LOKR can be read"):
        form.read(out, tiny)


def test_a_transformer(
    pixart: Any, job_of: Callable[..., Any], read_back: Callable[..., dict[str, float]]
) -> None:
    job = job_of(pixart, {"dora": {"sites": "all", "rank": 2, "alpha": 3}})
    assert max(read_back("peft", job).values()) <= LIMIT
