"""The options of `sample`: sizes, files of prompts, batches, sheets, and what `adapter=` takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.__main__ import main
from trainer.cli.given_adapter import given_adapter
from trainer.common.exit_codes import BAD_RECIPE
from trainer.media.contact_sheet import Strip, contact_sheet, thumbnail
from trainer.media.made_by import facts_in

Printed = pytest.CaptureFixture[str]
Save = Callable[..., Path]
LORA = {"lora": {"sites": "cross", "rank": 2}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(printed: Printed, *words: str) -> list[Path]:
    """What is written, in one step."""
    printed.readouterr()
    own = () if any(word.startswith("from=") for word in words) else ("steps=1", "guidance=3")
    assert main(["sample", *own, *words]) == 0
    return [Path(line) for line in printed.readouterr().out.split("\n") if line]


def refused(printed: Printed, *words: str) -> str:
    printed.readouterr()
    assert main(["sample", "steps=1", *words]) == BAD_RECIPE
    return printed.readouterr().err


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("word", "size"),
    [("size=40", (40, 40)), ("size=48x24", (48, 24)), ("resolution=40", (40, 40)), ("", (32, 32))],
)
def test_size(word: str, size: tuple[int, int], tiny_folder: Path, capsys: Printed) -> None:
    """Width x height."""
    (path,) = made(capsys, f"backbone={tiny_folder}", "prompt=a fox", *([word] if word else []))
    with Image.open(path) as picture:
        assert picture.size == size
    assert facts_in(path)["size"] == f"{size[0]}x{size[1]}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["size=50"], "size=50: this backbone takes sides in multiples of 4 pixels; give 48 or 52"),
        (["size=64x50"], "size=50: this backbone takes sides in multiples of 4"),
        (["size=12"], "size=12: give one side as in 512, or width x height as in 768x512"),
        (["size=12xb"], "size='12xb': give one side as in 512"),
        (["size=32", "resolution=32"], "size is given twice"),
        (["scheduler=eulr"], "scheduler=eulr: no such solver; did you mean euler?"),
        (["scheduler=lcm"], "scheduler=lcm is for networks distilled"),
        (["scale=0.5"], "scale is the strength of an adapter; give adapter= too"),
        (
            ["methods.text2video_zero.smoothing=0.4"],
            "smoothing=0.4 has no effect: the background is",
        ),
        (["methods.pix2video.weight=0", "methods.pix2video.share=1"], "weight=0 pulls nothing"),
        (["prompts=x.txt"], "give prompt or prompts, not both"),
        (["strength=0.5"], "strength=0.5 has no effect: it is how much of a picture changes"),
        (["structure_level=2"], "structure_level=2 has no effect: it is how coarse a structure"),
        (["structure=x.mp4"], "structure=x.mp4: no such file"),
        (["temporal_guidance=2"], "temporal_guidance=2 is for clips that are guided; give frames"),
        (["negative=red", "guidance=1"], "negative=red has no effect: guidance=1 does not guide"),
        (["strength=2", "image=a.png"], "strength=2: a number is needed, above 0 and at most 1"),
        (["image=a.png", "frames=2"], "image= begins a picture, and source= a clip"),
        (["image=none.png"], "none.png: no such file"),
        (["out=fox.png"], "out='fox.png': pictures and clips are named by their prompts and seeds"),
        (["out=there.txt"], "out='there.txt': this is a file; name the folder to write into"),
        (["batch=0"], "batch=0: a whole number is needed, at least 1"),
        (["from=none.png"], "none.png: no such file"),
    ],
)
def test_refusals(words: list[str], says: str, tiny_folder: Path, capsys: Printed) -> None:
    Path("there.txt").touch()
    assert says in refused(capsys, f"backbone={tiny_folder}", "prompt=a fox", *words)
    assert not Path("samples").exists()


def test_prompts_of_a_file(tiny_folder: Path, capsys: Printed) -> None:
    Path("p.txt").write_text("\ufeff# of foxes\na fox\n\n   \n  a tree, red  \n#end", "utf-8")
    words = (f"backbone={tiny_folder}", "prompts=p.txt", "count=2", "seed=5")
    *found, sheet = made(capsys, *words)
    assert [path.name for path in found] == [
        "a-fox-5.png", "a-fox-6.png", "a-tree-red-5.png", "a-tree-red-6.png"
    ]  # fmt: skip
    assert [facts_in(path)["prompt"] for path in found] == ["a fox"] * 2 + ["a tree, red"] * 2
    assert sheet.name == "a-fox-sheet.png"
    facts = facts_in(sheet)
    assert facts["rows"] == ["a fox", "a tree, red"] and facts["seeds"] == [5, 6]
    assert "a sheet of several pictures" in refused(capsys, f"from={sheet}")
    (alone,) = made(capsys, f"backbone={tiny_folder}", "prompt=a tree, red", "seed=6", "out=alone")
    assert np.abs(pixels(alone) - pixels(found[3])).max() <= 1


@pytest.mark.parametrize("kind", ["none", "empty", "bytes", "word"])
def test_a_file_of_no_prompts(kind: str, tiny_folder: Path, capsys: Printed) -> None:
    given = {"empty": b"\n# a\n", "bytes": b"\xff\xfe\x00", "word": b"a fox\n\na <v9>\n"}
    if kind != "none":
        Path("p.txt").write_bytes(given[kind])
    says = refused(capsys, f"backbone={tiny_folder}", "prompts=p.txt")
    wanted = {"empty": "there is no prompt in it", "word": "prompts line 3: 'a <v9>': <v9> is no"}
    assert wanted.get(kind, "prompts=p.txt: cannot be read") in says


def test_the_batch_changes_no_picture(tiny_folder: Path, capsys: Printed) -> None:
    words = (f"backbone={tiny_folder}", "prompt=a fox", "count=5", "sheet=false", "size=40x24")
    runs = {n: made(capsys, *words, f"batch={n}", f"out=of{n}") for n in (1, 2, 5)}
    for n in (2, 5):
        for one, other in zip(runs[1], runs[n], strict=True):
            assert np.abs(pixels(one) - pixels(other)).max() <= 1
    places = [(facts_in(path).get("batch"), facts_in(path).get("row")) for path in runs[2]]
    assert places == [(2, 0), (2, 1), (2, 0), (2, 1), (None, None)]


def test_a_picture_to_begin_from(tiny_folder: Path, capsys: Printed) -> None:
    """It is cut to the size, and named in the file; from= finds it again."""
    Image.effect_noise((90, 60), 80).convert("RGB").save("start.png")
    words = (f"backbone={tiny_folder}", "prompt=a fox", "size=48x32", "image=start.png")
    picture = {}
    for strength in (0.2, 1.0):
        (picture[strength],) = _at(capsys, words, strength)
    facts = facts_in(picture[0.2])
    assert (facts["image"], facts["strength"]) == ("start.png", 0.2)
    with Image.open("start.png") as start:
        from PIL import ImageOps

        cut = np.asarray(ImageOps.fit(start.convert("RGB"), (48, 32))).astype(int)
    near, far = (np.abs(pixels(picture[s]) - cut).mean() for s in (0.2, 1.0))
    assert near < far
    capsys.readouterr()
    assert main(["sample", f"from={picture[0.2]}", f"backbone={tiny_folder}", "out=again"]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert np.array_equal(pixels(again), pixels(picture[0.2]))
    Image.new("RGB", (90, 60)).save("start.png")
    says = refused(capsys, f"from={picture[0.2]}", f"backbone={tiny_folder}")
    assert "its image start.png has changed since the picture was made" in says


def _at(capsys: Printed, words: tuple[str, ...], strength: float) -> list[Path]:
    capsys.readouterr()
    more = ("steps=5", "guidance=3", f"strength={strength}", f"out=at{strength}")
    assert main(["sample", *words, *more]) == 0
    return [Path(line) for line in capsys.readouterr().out.split("\n") if line]


def test_a_sheet_shows_each_picture_small_and_whole() -> None:
    colours = ["red", "lime", "blue"]
    pictures = [thumbnail(Image.new("RGB", (400, 200), colour)) for colour in colours]
    assert {picture.size for picture in pictures} == {(192, 96)}
    strips = [Strip("first", pictures[:2], ["0", "1"]), Strip("second", pictures[2:], ["0"])]
    sheet = np.asarray(contact_sheet(strips)).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert int((sheet == colour).all(1).sum()) == 192 * 96
    many = contact_sheet([Strip("a", pictures * 7, [str(n) for n in range(21)])])
    assert many.width < 8 * 200 + 8 and many.height > 3 * 96


def test_a_sheet_of_several_pictures_alone(tiny_folder: Path, capsys: Printed) -> None:
    words = (f"backbone={tiny_folder}", "prompt=a fox", "count=2")
    first = made(capsys, *words)
    assert [path.name for path in first] == ["a-fox-0.png", "a-fox-1.png", "a-fox-sheet.png"]
    assert made(capsys, *words) == first  # equal bytes are left
    assert len(made(capsys, *words, "sheet=false", "out=b")) == 2
    assert len(made(capsys, *words, "frames=2", "out=c")) >= 2
    assert not list(Path("c").glob("*sheet*"))


def test_adapters_with_scales(tiny_folder: Path, save_trained_on: Save, capsys: Printed) -> None:
    one = save_trained_on(tiny_folder, LORA | {"new_token": {"tokens": ["<a>"]}}, "one")
    two = save_trained_on(tiny_folder, {"selective": {}, "new_token": {"tokens": ["<b>"]}}, "two")
    words = (f"adapter=[{one},{two}]", "prompt=a <a> on a <b>")
    (path,) = made(capsys, *words, "scale=[0.8,0.5]")
    facts = facts_in(path)
    assert (facts["adapter"], facts["scale"]) == (["one", "two"], [0.8, 0.5])
    (again,) = made(capsys, f"from={path}", "out=again")
    assert again.read_bytes() == path.read_bytes()
    (whole,) = made(capsys, *words, "out=whole")
    assert not np.array_equal(pixels(whole), pixels(path))
    says = refused(capsys, *words, "scale=[1,2,3]")
    assert "scale has 3 values for 2 adapters; give one each, or one for all" in says
    says = refused(capsys, *words, "scale=[{lora: 0.5},1]")
    assert "scale.<method> is for one adapter; of several, give a number for each" in says
    dora = save_trained_on(tiny_folder, {"dora": {"sites": "cross"}}, "dora")
    assert "methods.dora" in refused(capsys, f"adapter={dora}", "prompt=a", "scale=0.5")


def test_one_method_of_an_adapter_at_a_scale(
    tiny_folder: Path, save_trained_on: Save, capsys: Printed
) -> None:
    """What the other method does stays; the picture says the scale, and is made again with it."""
    tree = {"lora": {"sites": "self"}, "dora": {"sites": "cross"}}
    adapter = save_trained_on(tiny_folder, tree)
    words = (f"adapter={adapter}", "prompt=a fox")
    (whole,) = made(capsys, *words, "out=whole")
    (some,) = made(capsys, *words, "scale.lora=0", "out=some")
    assert not np.array_equal(pixels(whole), pixels(some))
    assert facts_in(some)["scale"] == {"lora": 0}
    (again,) = made(capsys, f"from={some}", "out=again")
    assert again.read_bytes() == some.read_bytes()
    says = refused(capsys, *words, "scale.loar=0")
    assert "scale.loar: adapter=" in says and "it has dora, lora" in says
    for wrong in ("scale.lora=much", "scale=much", "scale=[0.5,much]"):
        assert "give a number, as in scale=0.5; one for a method" in refused(capsys, *words, wrong)


def test_a_run_that_has_not_finished(
    tiny_folder: Path, save_trained_on: Save, capsys: Printed
) -> None:
    """Its last checkpoint, or the moving average in it, as an adapter of these weights would be."""
    from trainer.config.header import read_header
    from trainer.training.checkpoint_files import write_checkpoint

    adapter = save_trained_on(tiny_folder, LORA)
    tree, identity = read_header(adapter)
    weights, run = load_file(adapter), Path("runs/lora/9")
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    assert "has no checkpoint yet" in refused(capsys, f"adapter={run}", "prompt=a fox")
    averaged = {name: value + 0.01 for name, value in weights.items()}
    states: dict[int, dict[str, Any]] = {
        10: {"parts": {}}, 20: {"parts": {"ema": {"steps": 20, "averaged": averaged}}}
    }  # fmt: skip
    facts = {"micro_step": 0, "recipe": tree, "backbone": identity}
    for step, state in states.items():
        write_checkpoint(run / "checkpoints", weights, state, facts | {"step": step})
    capsys.readouterr()
    assert main(["sample", f"adapter={run}", "prompt=a fox", "steps=1", "guidance=3"]) == 0
    out, err = capsys.readouterr()
    assert "a run that has not finished, its weights after step 20" in err
    own = facts_in(Path(out.strip()))
    assert (own["adapter"], own["step"]) == ("lora/9", 20)
    (ten,) = made(capsys, f"adapter={run}/checkpoints/step-000010", "prompt=a fox", "out=ten")
    (wanted,) = made(capsys, f"adapter={adapter}", "prompt=a fox", "out=wanted")
    assert np.array_equal(pixels(ten), pixels(wanted))
    assert not np.array_equal(pixels(Path(out.strip())), pixels(wanted))
    ours = given_adapter(run, None, print).file
    ours.write_bytes(ours.read_bytes()[:-1])  # the cache is not believed
    (again,) = made(capsys, f"from={out.strip()}", "out=again")
    assert again.read_bytes() == Path(out.strip()).read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-000020")
    assert "its adapter lora/9" in refused(capsys, f"from={out.strip()}")


@pytest.mark.parametrize("kind", ["kohya", "peft"])
def test_a_file_of_another_tool(
    kind: str, tiny_folder: Path, save_trained_on: Save, capsys: Printed
) -> None:
    adapter = save_trained_on(tiny_folder, LORA)
    (wanted,) = made(capsys, f"adapter={adapter}", "prompt=a fox", "out=wanted")
    out = ["export", f"adapter={adapter}", "out=foreign", f"format={kind}", "device=cpu"]
    assert main(out) == 0
    given = Path("foreign")
    if kind == "kohya":
        (given,) = given.glob("*.safetensors")
    assert "give the backbone it was made for too" in refused(
        capsys, f"adapter={given}", "prompt=a fox"
    )
    words = (f"adapter={given}", f"backbone={tiny_folder}", "prompt=a fox")
    (own,) = made(capsys, *words, "out=own")
    assert np.abs(pixels(own) - pixels(wanted)).max() <= 1
    half, base = (made(capsys, *words, f"scale={s}", f"out=s{s}")[0] for s in (0.5, 0))
    (plain,) = made(capsys, f"backbone={tiny_folder}", "prompt=a fox", "out=plain")
    assert np.array_equal(pixels(base), pixels(plain))
    assert not np.array_equal(pixels(half), pixels(plain))
    assert facts_in(own)["adapter"] == given.stem


def test_a_file_is_imported_anew_for_other_weights(
    tiny_folder: Path, save_trained_on: Save, tmp_path: Path
) -> None:
    """One backbone's name may come to mean other files, and some adapters start from weights."""
    adapter = save_trained_on(tiny_folder, LORA)
    assert main(["export", f"adapter={adapter}", "out=x", "format=kohya", "device=cpu"]) == 0
    (given,) = Path("x").glob("*.safetensors")
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    first = given_adapter(given, str(base), print)
    assert given_adapter(given, str(base), print) == first
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(weights).items()}, weights)
    again = given_adapter(given, str(base), print)
    assert again.file != first.file and again.facts == first.facts


def test_an_imported_file_that_has_changed_is_imported_again(
    tiny_folder: Path, save_trained_on: Save, capsys: Printed
) -> None:
    """Weights that are finite and of the right shapes are compared with their checksum, too."""
    adapter = save_trained_on(tiny_folder, LORA)
    assert main(["export", f"adapter={adapter}", "out=x", "format=kohya", "device=cpu"]) == 0
    (given,) = Path("x").glob("*.safetensors")
    file = given_adapter(given, str(tiny_folder), print).file
    wanted = file.read_bytes()
    file.write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    capsys.readouterr()
    assert given_adapter(given, str(tiny_folder), print).file == file
    assert f"{file}, kept from before, is damaged or was changed" in capsys.readouterr().out
    assert file.read_bytes() == wanted
    given_adapter(given, str(tiny_folder), print)
    assert capsys.readouterr().out == ""


def test_a_stranger_s_file_says_what_is_wrong(tiny_folder: Path, capsys: Printed) -> None:
    save_file({"a.b": torch.zeros(2, 2)}, "x.safetensors")
    words = ("adapter=x.safetensors", f"backbone={tiny_folder}", "prompt=a fox")
    assert "its keys, like a.b, are of no known format" in refused(capsys, *words)
    Path("y.safetensors").write_bytes(b"\x80\x04.")
    assert "not a safetensors file" in refused(capsys, "adapter=y.safetensors", "prompt=a fox")
    assert "no such file" in refused(capsys, "adapter=z.safetensors", "prompt=a fox")


def test_a_picture_from_a_picture_with_an_adapter_of_clips(tmp_path: Path, capsys: Printed) -> None:
    """A clip of it would be one frame a seed."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    words = [
        "adapter=tiny_motion",
        f"image={tmp_path / 'a.png'}",
        "prompt=a fox",
        "sheet=false",
        "strength=1",
    ]
    found = made(capsys, *words, "count=2", "out=pictures")
    assert [path.suffix for path in found] == [".png", ".png"]
    assert all(facts_in(path).get("frames", 1) == 1 for path in found)
    again = made(capsys, f"from={found[1]}", "out=again")
    assert np.array_equal(pixels(again[0]), pixels(found[1]))
