"""`check` opens the data of every source as `fit` does: what leaves nothing to train on, is damaged
or says no word is refused by both, in the same sentence."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import pack

from trainer.__main__ import main
from trainer.data.sources import remote
from trainer.media.write_video import encode_video
from trainer.training import data_check

BASE = ["recipe=lora", "methods.lora.rank=2", "run.steps=1", "tracker=none", "preview.every=0"]
ABSENT = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both
PLAIN = ["methods.new_token=null"]  # no word is trained


def photo(seed: int = 0) -> Image.Image:
    return Image.effect_noise((64, 64), 40 + seed).convert("RGB")


def jpeg(seed: int = 0) -> bytes:
    file = io.BytesIO()
    photo(seed).save(file, "JPEG")
    return file.getvalue()


def photos(folder: Path, *, good: int = 1, bad: int = 0, text: str = "a cup") -> Path:
    """Readable photos and damaged ones, all with a caption."""
    folder.mkdir()
    for number in range(good + bad):
        data = jpeg(number)
        (folder / f"{number}.jpg").write_bytes(data if number < good else data[: len(data) // 2])
        (folder / f"{number}.txt").write_text(text)
    return folder


def shards(folder: Path, *, count: int = 2, text: bytes = b"a cup") -> Path:
    folder.mkdir()
    members = [
        (f"{n}.{kind}", data)
        for n in range(count)
        for kind, data in (("jpg", jpeg(n)), ("txt", text))
    ]
    pack(folder / "a.tar", *members)
    return folder


def film(path: Path, frames: int = 4) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encode_video([np.asarray(photo(n)) for n in range(frames)], fps=8))
    path.with_suffix(".txt").write_text("a cup")
    return path


def of_shards(place: Path) -> list[str]:
    return [*PLAIN, "data.source=shards", f"data.shards={shards(place / 's')}", "data.validation=2"]


def of_skipped_photos(place: Path) -> list[str]:
    folder = photos(place / "p", good=1, bad=1)
    return [
        *PLAIN,
        "data.source=folder",
        f"data.folder={folder}",
        "data.validation=1",
        "data.on_bad=skip",
    ]


def of_damaged_photos(place: Path) -> list[str]:
    return [*PLAIN, "data.source=folder", f"data.folder={photos(place / 'p', good=1, bad=1)}"]


def of_a_concept(place: Path) -> list[str]:
    folder = photos(place / "p", good=1, bad=1, text="a <v1> cup")
    concept = [f"data.concept={folder}", "data.class_word=cup", "data.prior_weight=0"]
    return ["data.source=concept", *concept, "data.validation=1", "data.on_bad=skip"]


def of_class_images(place: Path) -> list[str]:
    own, others = photos(place / "p", text="a <v1> cup"), photos(place / "q", good=0, bad=1)
    return ["data.source=concept", f"data.concept={own}", "data.class_word=cup",
            f"data.prior_folder={others}", "data.on_bad=skip"]  # fmt: skip


def of_short_films(place: Path) -> list[str]:
    film(place / "v" / "a.mp4")
    return [*PLAIN, "data.source=video", f"data.video={place / 'v'}", "data.frames=6"]


def of_films_in_tars(place: Path) -> list[str]:
    data = film(place / "v" / "a.mp4").read_bytes()
    pack(place / "v.tar", ("a.mp4", data), ("a.txt", b"a cup"))
    return [*PLAIN, "data.source=video", f"data.video={place / 'v.tar'}", "data.frames=2",
            "data.validation=1"]  # fmt: skip


def of_stills(place: Path) -> list[str]:
    film(place / "v" / "a.mp4")
    stills = photos(place / "p", good=0, bad=1)
    return [*PLAIN, "data.source=video", f"data.video={place / 'v'}", "data.frames=2",
            "data.images=0.5", f"data.stills={stills}", "data.on_bad=skip"]  # fmt: skip


def of_films_as_pictures(place: Path) -> list[str]:
    data = film(place / "v" / "a.mp4").read_bytes()
    pack(place / "v.tar", ("a.mp4", data), ("a.txt", b"a cup"))
    return [*PLAIN, "data.source=shards", f"data.shards={place / 'v.tar'}"]


def of_a_mask(place: Path) -> list[str]:
    folder = photos(place / "p")
    wide = Image.new("RGB", (192, 64), "grey")
    wide.save(folder / "0.jpg")
    mask = Image.new("L", (192, 64))
    mask.paste(255, (0, 0, 16, 64))  # outside of the square that is trained on
    mask.save(folder / "0_mask.png")
    return [*PLAIN, "data.source=folder", f"data.folder={folder}"]


def of_a_word(place: Path) -> list[str]:
    folder = shards(place / "s")
    return ["data.source=shards", f"data.shards={folder}", "methods.new_token.tokens=[<v9>]"]


CASES = {
    of_shards: "holds out all 2 samples",
    of_skipped_photos: "holds out all 1 usable images",
    of_damaged_photos: "1 of 2 images cannot be used",
    of_a_concept: "holds out all 1 photos",
    of_class_images: "1 of 1 images cannot be used",
    of_short_films: "1 of 1 videos cannot be used",
    of_films_in_tars: "holds out all 1 usable videos",
    of_stills: "1 of 1 images cannot be used",
    of_films_as_pictures: "contains videos",
    of_a_mask: "its mask leaves nothing of the centre",
    of_a_word: "<v9> is in none of 2 captions",
}


@pytest.mark.parametrize("given", CASES, ids=lambda given: given.__name__[3:])
def test_check_and_fit_refuse_the_same(given: Any, tmp_path: Path, capsys: Any) -> None:
    words = [*BASE, *given(tmp_path), f"run.out={tmp_path / 'runs'}"]
    said = []
    for verb in ("check", "fit"):
        code = main([verb, *words])
        printed = capsys.readouterr()
        said.append((code, printed.err.partition("error: ")[2]))
    assert said[0] == said[1]
    assert said[0][0] and CASES[given] in said[0][1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run.out=there.txt"], "there.txt: this is a file, where a run needs a folder"),
        ([f"run.device={ABSENT}"], "finds no such device"),
    ],
)
def test_what_the_machine_has_not(
    words: list[str], says: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.txt").touch()
    for verb in ("check", "fit"):
        assert main([verb, *BASE, *words]) and says in capsys.readouterr().err


def test_concepts_in_a_row_need_a_judge(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    folder = photos(tmp_path / "p")
    for path in folder.glob("*.txt"):
        path.unlink()
    words = ["recipe=c_lora", f"backbone={tiny_folder}", f"continual.concepts=[{folder},{folder}]",
             "continual.class_words=[cup,cup]", "data.prior_weight=0"]  # fmt: skip
    for verb in ("check", "fit"):
        assert main([verb, *words, f"run.out={tmp_path / 'runs'}"])
        assert "the backbone has no judge of its own" in capsys.readouterr().err
    assert main(["check", *words, "continual.images=0"]) == 0


def test_what_is_skipped_is_said(tmp_path: Path, capsys: Any) -> None:
    folder = photos(tmp_path / "p", good=2, bad=1)
    words = [*BASE, *PLAIN, "data.source=folder", f"data.folder={folder}", "data.on_bad=skip"]
    assert main(["check", *words]) == 0
    assert "skipped 2.jpg:" in capsys.readouterr().out


def test_files_that_are_too_many_are_counted(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "MOST", 100)
    words = [*BASE, *of_shards(tmp_path)]
    assert main(["check", *words]) and "holds out every sample" in capsys.readouterr().err
    assert main(["check", *words[:-1]]) == 0 and "not decoded" in capsys.readouterr().out
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_no_class_image_is_generated(tmp_path: Path, capsys: Any) -> None:
    folder = photos(tmp_path / "p", text="a <v1> cup")
    words = [*BASE, "data.source=concept", f"data.concept={folder}",
             "data.class_word=cup", "data.prior_images=3"]  # fmt: skip
    assert main(["check", *words]) == 0


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_nothing_is_written_beside_the_data(tmp_path: Path, capsys: Any) -> None:
    films = of_films_in_tars(tmp_path)
    for words in (of_shards(tmp_path)[:-1], [*films[:-1], "data.validation=0"]):
        before = listing(tmp_path)
        assert main(["check", *BASE, *words]) == 0, capsys.readouterr().err
        assert listing(tmp_path) == before


def test_a_server_without_an_answer_is_a_remark(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fit` needs the data, and refuses."""
    monkeypatch.setattr(remote, "WAIT", 0.0)
    with socket.socket() as taken:  # bound, and nothing listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/data"
        words = [*BASE, *PLAIN, "data.source=remote", f"data.url={url}"]
        assert main(["check", *words]) == 0
        said = capsys.readouterr().out
        assert "data: its server gives no answer now, so the data is not checked" in said
        assert url in said
        assert main(["fit", *words, f"run.out={tmp_path / 'runs'}"])
        assert f"{url}/manifest.json: " in capsys.readouterr().err
