"""The proof of an import by LyCORIS' own loader, on files that LyCORIS has written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from foreign.case import fresh
from foreign.of_lycoris import ALL, lycoris, wrapper

from trainer.export.apply_bundle import add_to
from trainer.export.bundle import FullDelta
from trainer.export.detect import detect
from trainer.export.import_ import read_bundle
from trainer.export.import_check import Question, compare
from trainer.export.lycoris_loader import reads

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = "LyCORIS' own loader"
FILES = {
    "loha": lycoris("loha", text=True, preset=ALL),
    "lokr": wrapper("lokr"),
    "dora": lycoris("locon", text=True, preset=ALL, dora_wd=True),
    "full": lycoris("full", preset=ALL),
}


@pytest.fixture(scope="module")
def base(tiny_folder: Path, open_folder: Callable[[Path], Any]) -> Any:
    pytest.importorskip("lycoris")
    return open_folder(tiny_folder)


@pytest.mark.parametrize("kind", FILES)
def test_what_was_read_is_compared_with_lycoris(kind: str, base: Any, tmp_path: Path) -> None:
    """Every layer of the file is; a reading that is twice as strong is refused."""
    path = FILES[kind](fresh(base), tmp_path).path
    name = detect(path)
    bundle = read_bundle(name, path, fresh(base))
    said = compare(Question(name, path, bundle), add_to(fresh(base), bundle), lambda: fresh(base))
    biases = [d for d in bundle.layers.values() if isinstance(d, FullDelta) and d.bias is not None]
    count = len(bundle.layers) + len(biases)
    assert said.startswith(f"{OWN} makes the same weights of {count} layers and words of the file")
    path_of, delta = next(iter(bundle.layers.items()))
    if isinstance(delta, FullDelta):
        assert delta.weight is not None
        wrong: Any = replace(delta, weight=2 * delta.weight)
    else:
        wrong = replace(delta, up=2 * delta.up)
    other = replace(bundle, layers={**bundle.layers, path_of: wrong})
    with pytest.raises(ValueError, match=f"{OWN} gives 1 layers other weights.*nothing was writt"):
        compare(Question(name, path, other), add_to(fresh(base), other), lambda: fresh(base))


def test_files_of_other_names_are_not_asked_for() -> None:
    pytest.importorskip("lycoris")
    assert reads(["lora_te_x.alpha"]) and reads(["lycoris_x.lokr_w1"])
    assert not reads(["unet.x.lora_A.weight", "diffusion_model.x.diff"])
