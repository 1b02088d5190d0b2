"""`sample from=picture.png`: the same picture again, bit for bit, or what has changed, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.__main__ import main
from trainer.cli.repeat_picture import RepeatedPicture, _difference
from trainer.common.exit_codes import BAD_RECIPE
from trainer.media.made_by import facts_in, png_bytes, with_facts
from trainer.media.write_video import encode_video, write_clip

Printed = pytest.CaptureFixture[str]
LORA = {"lora": {"sites": "cross", "rank": 2}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(printed: Printed, *words: str) -> list[Path]:
    assert main(["sample", *words]) == 0
    return [Path(line) for line in printed.readouterr().out.split("\n") if line]


def refused(printed: Printed, *words: str) -> str:
    printed.readouterr()
    assert main(["sample", *words]) == BAD_RECIPE
    return printed.readouterr().err


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_picture_of_a_batch_again(tiny_folder: Path, tmp_path: Path, capsys: Printed) -> None:
    """Every setting is another than its default."""
    (tmp_path / "prompts.txt").write_text("a fox\na red apple on a tree\n")
    words = ("prompts=prompts.txt", "count=2", "seed=7", "steps=4", "guidance=3.5", "negative=red")
    more = ("size=40x24", "scheduler=euler_a", "batch=3", "out=one")
    shutil.copytree(tiny_folder, tmp_path / "mine")
    first = made(capsys, f"backbone={tmp_path / 'mine'}", *words, *more)
    assert [path.name for path in first[:-1]] == [
        "a-fox-7.png", "a-fox-8.png", "a-red-apple-on-a-tree-7.png", "a-red-apple-on-a-tree-8.png"
    ]  # fmt: skip
    assert len({pixels(path).tobytes() for path in first[:-1]}) == 4
    for path in first[:-1]:
        assert main(["sample", f"from={path}", "out=two"]) == 0
        out, err = capsys.readouterr()
        assert Path(out.strip()).read_bytes() == path.read_bytes()
        assert err == f"{path}: repeated, bit for bit\n"
    assert len(list((tmp_path / "two").iterdir())) == 4


def test_what_is_given_replaces_what_the_picture_says(
    tiny_folder: Path, tmp_path: Path, capsys: Printed
) -> None:
    common = (f"backbone={tiny_folder}", "steps=2", "guidance=3")
    (first,) = made(capsys, *common, "prompt=a fox", "seed=3", "out=one")
    (wanted,) = made(capsys, *common, "prompt=a tree", "seed=4", "out=wanted")
    (own,) = made(
        capsys, f"from={first}", f"backbone={tiny_folder}", "prompt=a tree", "seed=4", "out=two"
    )
    assert own.read_bytes() != first.read_bytes()
    assert np.array_equal(pixels(own), pixels(wanted))
    capsys.readouterr()
    main(["sample", f"from={first}", f"backbone={tiny_folder}", "steps=1", "out=three"])
    assert "repeated" not in capsys.readouterr().err


def test_an_adapter_of_a_run_is_found_and_compared(
    tiny_folder: Path, tmp_path: Path, save_trained_on: Any, capsys: Printed
) -> None:
    run = tmp_path / "runs" / "lora" / "7"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    adapter = shutil.move(save_trained_on(tiny_folder, LORA), run / "adapter.safetensors")
    (first,) = made(capsys, f"adapter={run}", "prompt=a fox", "steps=2", "scale=0.5", "out=one")
    facts = facts_in(first)
    assert (facts["adapter"], facts["scale"]) == ("lora/7", 0.5)
    (again,) = made(capsys, f"from={first}", "out=two")
    assert again.read_bytes() == first.read_bytes()

    other = save_trained_on(tiny_folder, LORA | {"new_token": {}}, name="other")
    kept = adapter.with_name("kept")
    shutil.move(adapter, kept)
    shutil.copy(other, adapter)
    says = refused(capsys, f"from={first}", "out=three")
    assert "its adapter runs/lora/7 has changed since the picture was made" in says
    assert facts["adapter_sha256"] in says
    adapter.unlink()
    says = refused(capsys, f"from={first}", "out=three")
    assert "its adapter lora/7 (sha256" in says and "give adapter=<where it is>" in says
    (moved,) = made(capsys, f"from={first}", f"adapter={kept}", "scale=0.5", "out=four")
    assert np.array_equal(pixels(moved), pixels(first))


def test_a_backbone_that_has_changed_is_refused_by_its_part(
    tiny_folder: Path, tmp_path: Path, capsys: Printed
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "mine"
    shutil.copytree(tiny_folder, folder)
    (first,) = made(capsys, "backbone=mine", "prompt=a fox", "steps=1", "out=one")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    says = refused(capsys, f"from={first}", "out=two")
    assert "unet of backbone mine has changed since the picture was made" in says
    assert not (tmp_path / "two").exists()
    assert main(["sample", f"from={first}", "backbone=mine", "out=two"]) == 0
    err = capsys.readouterr().err
    assert "the one given is used" in err and "repeated, and differs by up to" in err
    shutil.rmtree(folder)
    assert "its backbone mine is not here" in refused(capsys, f"from={first}", "out=three")


@pytest.mark.parametrize("kind", [".gif", ".mp4"])
def test_a_clip_again_from_its_file(
    kind: str, tiny_folder: Path, tmp_path: Path, capsys: Printed
) -> None:
    """Its frames are compared as they were before they were encoded."""
    pytest.importorskip("av")
    words = (f"backbone={tiny_folder}", "prompt=a, fox: Attention trainer: 3", "steps=1", "fps=5")
    first = {path.suffix: path for path in made(capsys, *words, "frames=2", "out=one")}
    given = first[kind].rename(tmp_path / f"clip{kind}")  # no other file is beside it
    facts = facts_in(given)
    assert facts["frames"] == 2
    assert main(["sample", f"from={given}", f"backbone={tiny_folder}", "out=two"]) == 0
    out, err = capsys.readouterr()
    assert f"{given}: repeated, bit for bit" in err
    again = {path.suffix: path for path in map(Path, out.split())}
    assert facts_in(again[kind]) == facts
    assert again[kind].read_bytes() == given.read_bytes()
    differs = _difference(RepeatedPicture(given, facts, frozenset()), given, again[kind])
    assert differs is None
    other = facts | {"frames_sha256": "0" * 64}
    differs = _difference(RepeatedPicture(given, other, frozenset()), given, again[kind])
    assert differs == "in its frames before encoding, not in what the file shows"
    *_, longer = made(capsys, *words, "frames=3", "out=three")
    longer = longer.with_suffix(kind)
    differs = _difference(RepeatedPicture(given, facts, frozenset()), given, longer)
    assert differs == "in its size"
    red = made(capsys, *words, "frames=2", "seed=4", "out=four")[0].with_suffix(kind)
    differs = _difference(RepeatedPicture(given, facts, frozenset()), given, red)
    assert differs is not None and differs.startswith("by up to ")


def test_a_video_that_says_nothing(tmp_path: Path, capsys: Printed) -> None:
    pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_video(np.zeros((2, 32, 32, 3), np.uint8), 8))
    assert "nothing in it says what made it" in refused(capsys, f"from={path}")
    path.write_bytes(path.read_bytes()[:300])
    assert "truncated or damaged" in refused(capsys, f"from={path}")


KINDS = ["nothing", "other words", "no file", "no picture", "a list", "no end"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_says_nothing(kind: str, tmp_path: Path, capsys: Printed) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGB", (16, 16))
    if kind == "nothing":
        image.save(path)
    elif kind == "other words":
        path.write_bytes(png_bytes(image, {"attention_trainer": "{"}))
    elif kind == "a list":
        path.write_bytes(png_bytes(image, {"attention_trainer": "[1]"}))
    elif kind == "no end":
        path.write_bytes(png_bytes(image, {"attention_trainer": "[" * 100_000}))
    elif kind == "no picture":
        path.write_text("hello")
    says = refused(capsys, f"from={path}")
    wanted = {"no file": "no such file", "no picture": "not a readable PNG, GIF or MP4"}
    assert wanted.get(kind, "nothing in it says what made it") in says


def test_a_picture_leads_to_no_file_elsewhere(tmp_path: Path, capsys: Printed) -> None:
    """Its facts are a stranger's: a name with a path in it is not followed, and wrong values are
    refused by their keys."""
    from trainer.cli.repeat_picture import RepeatedPicture, _near

    beside = RepeatedPicture(tmp_path / "a.png", {}, frozenset())
    assert list(_near(beside, ["/etc/passwd", "../x", "a/../../x", "", "."])) == []
    facts = {"prompt": "a", "seed": "x", "steps": -3, "backbone": "tiny"}
    path = write_clip(torch.zeros(1, 3, 16, 16), tmp_path / "b", 8.0, facts=facts)[0]
    says = refused(capsys, f"from={path}")
    assert "seed='x'" in says and "steps=-3" in says


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"adapter": ["a", "b"], "adapter_sha256": ["x"]}, "of its adapters is incomplete"),
        ({"adapter": ["a", "b"], "adapter_sha256": 3}, "of its adapters is incomplete"),
        ({"adapter": "../a"}, "its adapter ../a (sha256 None) is not here"),
        ({"backbone": "tiny", "methods": {"os": {}}}, "methods.os"),
        ({"backbone": "tiny", "methods": {"lora": {}}}, "has weights to train"),
        ({"backbone": "tiny", "device": "a; b"}, "device='a; b'"),
        ({"backbone": "tiny", "scheduler": {"_target_": "os.system"}}, "scheduler"),
        ({"backbone": "tiny", "image": "/etc/passwd", "image_sha256": "0"}, "its image /etc/pas"),
    ],
)
def test_facts_of_a_stranger(
    facts: dict[str, Any], says: str, tmp_path: Path, capsys: Printed
) -> None:
    given = {"prompt": "a", "seed": 1, "steps": 1, "row": "x", "batch": 2} | facts
    path = write_clip(torch.zeros(1, 3, 16, 16), tmp_path / "b", 8.0, facts=given)[0]
    assert says in refused(capsys, f"from={path}")


def test_the_facts_come_back(tmp_path: Path) -> None:
    facts = {"prompt": "a fox", "scale": [0.5, 1.0], "adapter": ["a", "b"]}
    image = with_facts(Image.new("RGB", (8, 8)), facts)
    (tmp_path / "a.png").write_bytes(png_bytes(image))
    assert facts_in(tmp_path / "a.png") == facts
    assert 'Adapter: "a, b"' in image.info["parameters"]
    assert json.loads(image.info["attention_trainer"]) == facts
