"""The source `parquet`: rows as the Hub keeps them, checked as shards are, and each refusal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data.source import Needs
from trainer.data.sources.parquet import Parquet
from trainer.media.images import ImageError, resize_cover, to_tensor

RNG = np.random.default_rng(0)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 40, 3), np.uint8))


def encoded(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise(seed).save(buffer, kind)
    return buffer.getvalue()


def rows(*seeds: int) -> list[dict[str, Any]]:
    return [{"image": {"bytes": encoded(n), "path": f"{n}.png"}, "text": f"row {n}"} for n in seeds]


def write(path: Path, made: list[dict[str, Any]], **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(made, **columns), path, row_group_size=2)
    return path


def open_parquet(place: Path, **options: Any) -> Any:
    source = Parquet(parquet=place, **options)
    return source.open(Needs(16, 4, lambda *_: (), place.parent / "cache", lambda: "tiny"))


def test_rows_are_samples_in_their_order(tmp_path: Path) -> None:
    place = write(tmp_path / "a.b.parquet", rows(0, 1, 2, 3, 4))
    train, held_out = open_parquet(place, validation=1)
    assert [train.key(i) for i in range(4)] == [f"a_b-row{i}" for i in range(4)]
    for i in range(4):
        sample = train.sample(i, RNG)
        assert sample.caption == f"row {i}"
        assert sample.image.equal(to_tensor(resize_cover(noise(i), 16)))
    assert held_out.sample(0, RNG).caption == "row 4"
    again, _ = open_parquet(place, validation=1)
    assert again.identity() == train.identity() and again.fingerprint() == train.fingerprint()
    assert Parquet(parquet=place, validation=1).epoch() == 4
    assert Parquet(parquet=place).found() == [
        f"{place}: 5 rows in 1 files; pictures: column image, captions: column text"
    ]
    write(place, rows(5, 1, 2, 3, 4))
    assert open_parquet(place, validation=1)[0].identity() != train.identity()


def test_rows_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.data.tars import from_parquet

    place = write(tmp_path / "a.parquet", rows(0, 1))
    open_parquet(place)
    monkeypatch.setattr(from_parquet, "write_shards", lambda *_, **__: pytest.fail("again"))
    open_parquet(place)
    (shard,) = (tmp_path / "cache" / "parquet").glob("*/*.tar")
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="not the bytes that manifest"):
        open_parquet(place)


def test_other_layouts(tmp_path: Path) -> None:
    made = [{"pic": encoded(n, "WEBP"), "what": f"row {n}", "id": n} for n in range(2)]
    place = write(tmp_path / "plain.parquet", made)
    train, _ = open_parquet(place, image_column="pic", caption_column="what")
    assert [train.caption(i, RNG) for i in range(2)] == ["row 0", "row 1"]
    hub = tmp_path / "hub"
    write(hub / "data" / "train-00000-of-00002.parquet", rows(0, 1))
    write(hub / "data" / "train-00001-of-00002.parquet", rows(2))
    write(hub / "data" / "test-00000-of-00001.parquet", rows(9))
    with pytest.raises(ValueError, match=r"files of test, train; choose one, as in data\.split=tr"):
        open_parquet(hub)
    train, _ = open_parquet(hub, split="train")
    assert [train.caption(i, RNG) for i in range(len(train))] == ["row 0", "row 1", "row 2"]
    with pytest.raises(ValueError, match=r"no file of data\.split=dev; it has test, train"):
        open_parquet(hub, split="dev")


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    made = rows(0, 1, 2, 3)
    made[0]["text"] = None
    made[1]["image"] = {"bytes": None, "path": "/etc/hostname"}
    made[2]["image"] = {"bytes": b"GIF89a and so on", "path": "a.gif"}
    made.append({"image": None, "text": None})
    place = write(tmp_path / "a.parquet", made)
    with pytest.raises(ImageError) as caught:
        open_parquet(place)
    said = str(caught.value)
    assert "4 of 5 samples cannot be used, data.on_bad=skip leaves them out" in said
    for words in ("a-row0: an image without a caption", "a-row1: 0 images among .txt",
                  "a-row2.jpg: a GIF", "a-row4: 0 images"):  # fmt: skip
        assert words in said, said
    train, _ = open_parquet(place, on_bad="skip")
    assert [train.key(i) for i in range(len(train))] == ["a-row3"] and len(train.skipped) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"image_column": "pic"},
            r"no column pic; it has image, text, n, also; choose by",
        ),
        ({"caption_column": "words"}, r"no column words; it has .*data\.caption_column"),
        ({"caption_column": "n"}, "column n holds int64 and no text"),
        (
            {"caption_column": "text", "image_column": "also"},
            "column also holds string and no",
        ),
    ],
)
def test_columns_that_are_not_there_are_named(
    tmp_path: Path, options: dict[str, str], says: str
) -> None:
    place = write(tmp_path / "a.parquet", [{**row, "n": 1, "also": "x"} for row in rows(0)])
    with pytest.raises(RecipeError, match=says):
        build_section(Parquet, {"parquet": str(place), **options}, "data")


def test_two_columns_of_captions_need_a_choice(tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", [{**row, "caption": "other"} for row in rows(0)])
    with pytest.raises(ValueError, match=r"both text and caption; .*data\.caption_column"):
        Parquet(parquet=place)
    assert open_parquet(place, caption_column="caption")[0].caption(0, RNG) == "other"


def test_places_without_parquet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        Parquet(parquet=tmp_path / "none")
    with pytest.raises(ValueError, match=r"no \.parquet in this folder"):
        Parquet(parquet=tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"not a \.parquet"):
        Parquet(parquet=tmp_path / "a.csv")
    pytest.importorskip("pyarrow")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"cut\.parquet: truncated or damaged"):
        Parquet(parquet=tmp_path / "cut.parquet")


def test_a_recipe_reads_it(tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", rows(0, 1, 2))
    words = ["recipe=lora_folder", "data.source=parquet", f"data.parquet={place}"]
    loaded = load_recipe([*words, "run.epochs=8", "optim.warmup=0"])
    assert loaded.run.steps == 6
    assert any("3 rows in 1 files" in line for line in loaded.said)


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"'attention-trainer\[parquet\]'"):
        Parquet(parquet=tmp_path / "a.parquet")


def test_what_a_mac_leaves_beside_files_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.parquet", rows(0, 1))
    (tmp_path / "set" / "._train.parquet").write_bytes(b"\0\5\26\7")
    train, _ = open_parquet(tmp_path / "set")
    assert len(train) == 2


def test_all_rows_held_out_is_refused_before_they_are_read(tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", rows(0, 1))
    with pytest.raises(RecipeError, match=r"validation=2 holds out all 2 rows in .*; give at most"):
        build_section(Parquet, {"parquet": str(place), "validation": 2}, "data")
