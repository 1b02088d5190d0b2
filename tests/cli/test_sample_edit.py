"""`sample` of edits: by `p2p` from a seed, of a clip by an adapter of `videop2p`, and again from
what is in the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE
from trainer.data.world.clips import draw_clip
from trainer.media.made_by import facts_in
from trainer.media.write_video import encode_video

pytest.importorskip("av")
Printed = pytest.CaptureFixture[str]
Save = Callable[..., Path]
TREE = {"videop2p": {}, "selective": {"sites": "all", "projections": ["q"]}}
SOURCE, PROMPT = "a fox on a red background", "a cat on a red background"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(draw_clip(0, 0, frames=3).frames, 8))
    return path


def made(printed: Printed, *words: str) -> list[Path]:
    printed.readouterr()
    assert main(["sample", *words]) == 0
    return [Path(line) for line in printed.readouterr().out.split("\n") if line]


def refused(printed: Printed, *words: str) -> str:
    printed.readouterr()
    assert main(["sample", "steps=4", *words]) == BAD_RECIPE
    return printed.readouterr().err


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(picture)]
    return np.stack(frames).astype(int)


def test_a_picture_is_edited_beside_its_source(tiny_folder: Path, capsys: Printed) -> None:
    """The source's own prompt gives the source, another prompt something else, twice the same."""
    common = (f"backbone={tiny_folder}", "steps=4", "guidance=3", "seed=5")
    method = f'methods.p2p={{source: "{SOURCE}", blend: true}}'
    (plain,) = made(capsys, *common, f"prompt={SOURCE}", "out=plain")
    (same,) = made(capsys, *common, method, f"prompt={SOURCE}", "out=same")
    assert np.abs(pixels(same) - pixels(plain)).max() <= 1
    (edit,) = made(capsys, *common, method, f"prompt={PROMPT}", "out=edit")
    (other,) = made(capsys, *common, f"prompt={PROMPT}", "out=other")
    assert np.abs(pixels(edit) - pixels(plain)).max() > 8
    assert np.abs(pixels(edit) - pixels(other)).max() > 8
    told = ("methods.p2p.blend=true", f"source_prompt={SOURCE}")
    (again,) = made(capsys, *common, *told, f"prompt={PROMPT}", "out=again")
    assert np.array_equal(pixels(again), pixels(edit))
    facts = facts_in(again)
    assert facts["source_prompt"] == SOURCE and facts["methods"] == {"p2p": {"blend": True}}
    assert main(["sample", f"from={again}", f"backbone={tiny_folder}", "out=repeated"]) == 0
    assert "repeated, bit for bit" in capsys.readouterr().err


def test_a_clip_is_edited_and_made_again(
    tiny_folder: Path, video: Path, save_trained_on: Save, capsys: Printed
) -> None:
    """The embeddings lie beside it, serve other prompts, and are made again where they are lost."""
    adapter = save_trained_on(tiny_folder, TREE)
    words = (f"adapter={adapter}", "frames=3", "steps=3", "guidance=3", f"source={video}")
    told = (f"source_prompt={SOURCE}", "methods.videop2p.null_text=2")
    first = made(capsys, *words, *told, f"prompt={PROMPT}", "out=one")
    clip = next(path for path in first if path.suffix == ".gif")
    facts = facts_in(clip)
    kept = Path("one") / facts["null_text"]
    assert load_file(kept)["uncond"].shape == (3, 32, 128)
    assert main(["sample", f"from={clip}", "out=two"]) == 0
    assert "repeated, bit for bit" in capsys.readouterr().err
    assert not list(Path("two").glob("*.safetensors"))  # those beside the first were read
    used = (f"null_text={kept}", f"source_prompt={SOURCE}", f"prompt={PROMPT}")
    same = made(capsys, *words, *used, "out=three")
    assert facts_in(same[-1])["frames_sha256"] == facts["frames_sha256"]
    kept.unlink()
    assert main(["sample", f"from={clip}", "out=four"]) == 0
    assert "repeated, bit for bit" in capsys.readouterr().err
    assert (Path("four") / facts["null_text"]).is_file()
    fast = made(capsys, *words, f"source_prompt={SOURCE}", "methods.videop2p.null_text=0",
                f"prompt={PROMPT}", "out=five")  # fmt: skip
    assert "null_text" not in facts_in(fast[-1])
    assert facts_in(fast[-1])["frames_sha256"] != facts["frames_sha256"]


def test_an_edit_goes_over_an_adapter(
    tiny_folder: Path, save_trained_on: Save, capsys: Printed
) -> None:
    adapter = save_trained_on(tiny_folder, {"lora": {"sites": "cross", "rank": 2}})
    words = (f"adapter={adapter}", "steps=4", "guidance=3", f"prompt={PROMPT}")
    (plain,) = made(capsys, *words, "out=plain")
    (edit,) = made(capsys, *words, f"source_prompt={SOURCE}", "methods.p2p={}", "out=edit")
    assert np.abs(pixels(edit) - pixels(plain)).max() > 1
    assert main(["sample", f"from={edit}", f"adapter={adapter}", "methods.p2p={}", "out=x"]) == 0
    assert np.array_equal(pixels(Path("x") / edit.name), pixels(edit))


def test_refusals(tiny_folder: Path, video: Path, save_trained_on: Save, capsys: Printed) -> None:
    adapter = save_trained_on(tiny_folder, TREE)
    bare, prompt = f"backbone={tiny_folder}", f"prompt={PROMPT}"
    source = f"source_prompt={SOURCE}"
    for words, says in (
        ((bare, prompt, source), "source_prompt='a fox on a red background' is for a method that"),
        ((bare, prompt, "methods.p2p={}"), "methods.p2p edits a source and is told of none; give"),
        ((bare, "prompt=a cat", source, "methods.p2p={}"), "to replace words, both need as many"),
        (
            (bare, prompt, source, "methods.p2p.word_weights={dog: 2}"),
            "the word 'dog' is not in the p",
        ),
        ((bare, prompt, source, "methods.p2p.cross_steps=[0.5,0.5]"), "an empty window of steps"),
        ((bare, prompt, source, "methods.p2p.cross_steps=[0.51,0.7]"), "has none of 4 steps"),
        ((bare, prompt, "null_text=x"), "null_text=x has no effect: it holds what was optimised"),
        ((bare, prompt, f"source={video}", "null_text=x"), "is for an edit of source=; give sour"),
        (
            (f"adapter={adapter}", prompt, "methods.videop2p.sites=cross"),
            "methods.videop2p.sites is what the adapter was trained with; options of videop2p tha",
        ),
        (
            (f"adapter={adapter}", prompt, source, "methods.p2p={}"),
            "methods.videop2p and methods.p2p both claim the start of sampling of unet",
        ),
    ):
        assert says in refused(capsys, *words), words
    other = Path("other.safetensors")
    shutil.copy(adapter, other)
    words = (f"adapter={adapter}", prompt, source, f"source={video}", f"null_text={other}")
    assert "holds no embeddings; give the file that an earlier" in refused(capsys, *words)


def test_linear_attention_has_no_maps_to_edit(tiny_folder: Path, capsys: Printed) -> None:
    """Named with both methods."""
    words = (f"backbone={tiny_folder}", f"prompt={PROMPT}", f"source_prompt={SOURCE}")
    says = refused(capsys, *words, "methods.p2p={}", "methods.tiled={}")
    assert "methods.p2p" in says and "methods.tiled" in says and "choose other sites" in says


def test_a_shorter_sampling_than_that_of_the_embeddings_is_refused(
    tiny_folder: Path, video: Path, save_trained_on: Save, capsys: Printed
) -> None:
    from trainer.cli.sample_source import read_null_text, write_null_text

    path = write_null_text(torch.ones(5, 32, 128), Path("kept"), video)
    assert path.name.startswith("clip-") and torch.equal(
        read_null_text(path), torch.ones(5, 32, 128)
    )
    words = (f"adapter={save_trained_on(tiny_folder, TREE)}", "frames=3", f"source={video}")
    told: Any = (f"source_prompt={SOURCE}", f"prompt={PROMPT}", f"null_text={path}")
    assert "those of 5 steps, and this sampling has 4" in refused(capsys, *words, *told)
