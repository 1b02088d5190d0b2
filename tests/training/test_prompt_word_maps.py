"""The maps of the words of previews: each of its own token, from the columns of one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trainer.diffusion.sampling_settings import Sampling
from trainer.ops.attention_maps import MapStore
from trainer.training.callbacks.preview import Preview
from trainer.training.prompt_word_maps import SHOWN, map_sites, word_places, write_word_maps

PROMPTS = ["a fox on a blue background", "a cat"]


def test_each_word_has_its_own_token(tiny_folder: Path, open_folder: Callable[..., Any]) -> None:
    backbone = open_folder(tiny_folder)
    found = word_places(backbone, PROMPTS, "fox</w>")
    assert found is not None
    assert found.words == [["a", "fox", "on", "blue", "background"], ["a", "cat"]]
    ids = [backbone.prompts.tokens([prompt]).input_ids.flatten().tolist() for prompt in PROMPTS]
    words = backbone.prompts.tokenizer.convert_ids_to_tokens([ids[0][i] for i in found.places[0]])
    assert words == ["fox</w>", "a</w>", "fox</w>", "on</w>", "blue</w>", "background</w>"]
    assert found.known == [[True] * 6, [False, True, True, False, False, False]]
    assert len(found.places[1]) == 6
    alone = word_places(backbone, PROMPTS, "fox</w>", own=False)
    assert alone is not None and alone.known == [[True], [False]] and alone.words == [[], []]
    assert word_places(backbone, ["a cat"], "fox</w>") is None
    long = word_places(backbone, ["fox " + " ".join(map(str, range(30)))], "fox</w>")
    assert long is not None and len(long.words[0]) == SHOWN


def test_a_preview_writes_the_map_of_each_word(
    tiny_folder: Path, open_folder: Callable[..., Any], tmp_path: Path
) -> None:
    """Its maps are those that a store of one word alone keeps in the same pass."""
    backbone = open_folder(tiny_folder)
    looked = Preview(tmp_path, PROMPTS, every=1, seed=0, settings=Sampling(1, 1.0), maps="fox</w>")
    pictures, maps = looked._sample(backbone)
    assert maps is not None and maps.shape[:2] == (2, 6)
    assert looked.places is not None
    place = looked.places.places[0][4]
    store = MapStore([place], group="target/cond")
    store.name = "alone"  # beside the one of the preview
    backbone.host.install(store, map_sites(backbone))
    looked._sample(backbone)
    backbone.host.remove(store)
    wanted = store.average((maps.shape[-2], maps.shape[-1]))[0, 0]
    torch.testing.assert_close(maps[0, 4], wanted)
    assert not torch.equal(maps[0, 4], maps[0, 3]) and maps[1, 0].abs().max() == 0
    step = tmp_path / "step-000007"
    step.mkdir()
    looked._write_maps(pictures, maps, step=7)
    names = ["00-a-fox-on-a-blue-background.maps.png", "01-a-cat.maps.png"]
    assert [path.name for path in sorted(step.iterdir())] == names
    with Image.open(step / names[0]) as sheet:
        assert sheet.info["words"] == "a, fox, on, blue, background"
        assert sheet.width > 5 * 96


def test_a_prompt_without_words_has_no_sheet(tmp_path: Path) -> None:
    pictures, maps = torch.zeros(2, 3, 16, 16), torch.rand(2, 1, 4, 4)
    write_word_maps(tmp_path, ["", "b"], [[], ["b"]], pictures=pictures, maps=maps)
    assert [path.name for path in tmp_path.iterdir()] == ["01-b.maps.png"]
