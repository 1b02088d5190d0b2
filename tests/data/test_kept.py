"""Pictures that are generated once: what an interruption leaves is kept, what is damaged is made
anew, and neither changes a bit of the set."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import start
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.common.long_work import LongWork
from trainer.data.kept import KeptSteps, kept_pictures, read_kept

COUNT, AT_ONCE = 12, 4


def picture(number: int, company: range) -> Image.Image:
    """It depends, as floating-point sums do, on the batch that it is made in."""
    values = np.random.default_rng([number, company.start, company.stop]).integers(
        0, 256, (8, 8, 3), dtype=np.uint8
    )
    return Image.fromarray(values)


class Maker:
    """Makes pictures, and raises before the batch with the number `breaks`."""

    def __init__(self, breaks: int | None = None) -> None:
        self.made: list[int] = []
        self.breaks = breaks

    def __call__(self, batch: range) -> list[Image.Image]:
        if self.breaks is not None and self.breaks in batch:
            raise RuntimeError("interrupted")
        self.made += batch
        return [picture(number, batch) for number in batch]


def kept(folder: Path, make: Callable[[range], Sequence[Image.Image]]) -> list[bytes]:
    found = kept_pictures(folder, COUNT, make, at_once=AT_ONCE, what="pictures")
    return [each.tobytes() for each in found]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interruption_keeps_what_is_finished(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole" / "one", tmp_path / "broken" / "one"
    wanted = kept(whole, Maker())
    with pytest.raises(RuntimeError, match="interrupted"):
        kept(broken, Maker(breaks=9))
    assert sorted(files(broken)) == [f"{number:05d}.png" for number in range(8)]
    rest = Maker()
    assert kept(broken, rest) == wanted
    assert rest.made == [8, 9, 10, 11]
    assert files(broken) == files(whole)


def test_a_display_of_more_is_told_of_each_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those that are there already too, and shows them in place of a display of their own."""
    told: dict[str, list[int]] = {"done": [], "found": []}
    work = LongWork(told["done"].append, told["found"].append)
    folder = tmp_path / "one"
    with pytest.raises(RuntimeError, match="interrupted"):
        kept(folder, Maker(breaks=9))
    capsys.readouterr()
    kept_pictures(folder, COUNT, Maker(), at_once=AT_ONCE, what="pictures", work=work)
    assert told["found"] == [8] and sum(told["done"]) == 4
    kept_pictures(folder, COUNT, Maker(), at_once=AT_ONCE, what="pictures", work=work)
    assert told["found"] == [8, 12] and sum(told["done"]) == 4
    assert capsys.readouterr().err == ""


def test_a_finished_set_is_read_alone(tmp_path: Path) -> None:
    wanted = kept(tmp_path, Maker())
    assert kept(tmp_path, lambda batch: pytest.fail("made again")) == wanted


def cut(data: bytes) -> bytes:
    return data[:-20]


def flip(data: bytes) -> bytes:
    middle = data.index(b"IDAT") + 40
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("spoil", [cut, flip, lambda data: b"", lambda data: b"nothing of ours"])
def test_a_damaged_picture_is_made_anew(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    wanted, before = kept(tmp_path, Maker()), files(tmp_path)
    path = tmp_path / "00005.png"
    path.write_bytes(spoil(path.read_bytes()))
    assert read_kept(path) is None
    again = Maker()
    assert kept(tmp_path, again) == wanted
    assert again.made == [4, 5, 6, 7]  # in the company that it was first made in
    assert files(tmp_path) == before


def test_pictures_in_the_place_of_others_are_made_anew(tmp_path: Path) -> None:
    """Two exchanged, one of another set, one without a place, as an earlier version wrote it."""
    wanted, other = kept(tmp_path / "one", Maker()), tmp_path / "other"
    before = files(tmp_path / "one")
    kept(other, Maker())
    paths = [tmp_path / "one" / f"{number:05d}.png" for number in range(COUNT)]
    paths[0].write_bytes(before["00001.png"])
    paths[1].write_bytes(before["00000.png"])
    paths[5].write_bytes((other / "00005.png").read_bytes())
    with Image.open(paths[9]) as image:
        image.copy().save(paths[9], pnginfo=PngInfo())
    again = Maker()
    assert kept(tmp_path / "one", again) == wanted
    assert again.made == list(range(COUNT)) and files(tmp_path / "one") == before


def test_steps_in_the_place_of_others_are_not_read(tmp_path: Path) -> None:
    steps, others = KeptSteps(tmp_path / "one"), KeptSteps(tmp_path / "other")
    for number in range(3):
        steps[number], others[number] = torch.full((2,), number), torch.full((2,), 9 + number)
    one, other = (tmp_path / name / "00001.npz" for name in ("one", "other"))
    assert torch.equal(steps.get(1), torch.full((2,), 1))
    (tmp_path / "one" / "00002.npz").write_bytes(one.read_bytes())
    assert steps.get(2) is None
    one.write_bytes(other.read_bytes())
    assert steps.get(1) is None and torch.equal(steps.get(0), torch.full((2,), 0))


def test_what_another_process_has_made_meanwhile_is_taken(tmp_path: Path) -> None:
    other = Maker()

    def make(batch: range) -> list[Image.Image]:
        kept(tmp_path, other)  # all of them, while this process makes its first batch
        return [picture(number, batch) for number in batch]

    assert len(kept(tmp_path, make)) == COUNT
    assert other.made == list(range(COUNT))


WORDS = "fit recipe=lora run.steps=1 run.batch_size=2 tracker=none preview.prompts=[] run.id=one"
PRIOR = "data.class_word=null data.prior_prompts=[a_fox,a_cat] data.prior_images=96"
SHORT = "data.prior_steps=1 run.validate_every=0 run.checkpoint_every=0 run.device=cpu"


def begun(backbone: Path, folder: Path) -> Any:
    words = [*WORDS.split(), *PRIOR.split(), *SHORT.split(), f"backbone={backbone}"]
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "TRAINER_CACHE": str(folder / "cache")}
    return start(*words, f"run.out={folder / 'runs'}", printed=folder, env=environment)


def pngs(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "cache" / "prior").glob("*/[0-9]*.png")}


def test_class_images_survive_a_kill(tiny_folder: Path, tmp_path: Path) -> None:
    """96 are wanted; the process is killed when 24 are there, and the next one makes the rest."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = begun(tiny_folder, killed)
    end = time.monotonic() + 240
    while len(pngs(killed)) < 24 and time.monotonic() < end and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    before = {name: path.stat().st_mtime_ns for name, path in pngs(killed).items()}
    assert 24 <= len(before) < 96
    for folder in (killed, whole):
        process = begun(tiny_folder, folder)
        process.join(300)
        said = (folder / "stderr").read_text()
        assert process.exitcode == 0, said[-2000:]
        if folder == killed:
            assert f"class images: {len(before)} of 96 are there already" in said
        assert "class images: 96 of 96 after" in said
    after = pngs(killed)
    assert {name: after[name].stat().st_mtime_ns for name in before} == before
    made = {name: path.read_bytes() for name, path in pngs(whole).items()}
    assert {name: path.read_bytes() for name, path in after.items()} == made
    assert len(made) == 96


def test_steps_are_kept_one_by_one(tmp_path: Path) -> None:
    """Exactly, and those that are missing or damaged are known to be."""
    told: list[int] = []
    kept = KeptSteps(tmp_path / "steps", told.append)
    assert len(kept) == 0 and kept.get(3) is None
    steps = {step: torch.randn(2, 3, generator=torch.manual_seed(step)) for step in (0, 3, 11)}
    for step, tensor in steps.items():
        kept[step] = tensor
    assert told == [1, 1, 1]
    again = KeptSteps(tmp_path / "steps")
    assert len(again) == 3
    for step, tensor in steps.items():
        found = again.get(step)
        assert found is not None and torch.equal(found, tensor)
    file = sorted((tmp_path / "steps").glob("*.npz"))[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert again.get(3) is None and again.get(11) is not None
