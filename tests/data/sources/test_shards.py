"""Shards: written alike each time, read as webdataset reads them, and every damage found."""

from __future__ import annotations

import io
import json
import pickle
import resource
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tars
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data.found import found_when_opened
from trainer.data.source import Needs, Source
from trainer.data.sources import shards
from trainer.data.sources.shards import Shards
from trainer.data.sources.world import Scenes
from trainer.data.tars.write_shards import Record, write_shards, write_world
from trainer.data.world.scenes import draw_scene
from trainer.data.world.sprites import HELD_OUT

RNG = np.random.default_rng(0)
FIRST, SECOND = "world-000000.tar", "world-000001.tar"


def open_shards(path: Path, **options: Any) -> Any:
    cache = (path if path.is_dir() else path.parent).parent / "cache"
    needs = Needs(64, 4, lambda prompts, seed, guidance: (), cache, lambda: "tiny")
    return Shards(shards=path, **options).open(needs)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_shards(path, **options)
    return str(caught.value)


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    """A tar with members as they are given, in a folder of its own; returns the folder."""
    path.mkdir(exist_ok=True)
    tars.pack(path / "a.tar", *members)
    return path


def special(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "elsewhere", size
    return info


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once") / "world"
    write_world(folder, 7, seed=3, per_shard=4)
    return folder


@pytest.fixture
def world(_world: Path, tmp_path: Path) -> Path:
    """Scenes 0..6 of seed 3 in two shards, to be damaged at will."""
    folder = tmp_path / "world"
    folder.mkdir()
    for path in _world.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    paths = write_world(tmp_path / "again", 7, seed=3, per_shard=4)
    assert [path.name for path in paths] == [FIRST, SECOND]
    names = sorted(path.name for path in world.iterdir())
    assert names == ["manifest.json", FIRST, SECOND]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes(), name
    write_world(tmp_path / "other", 7, seed=4, per_shard=4)
    assert (tmp_path / "other" / FIRST).read_bytes() != (world / FIRST).read_bytes()


def test_samples_are_the_scenes_of_the_source_world(world: Path) -> None:
    train, held_out = open_shards(world)
    assert held_out is None
    assert (len(train), train.fixed, list(train.skipped)) == (7, True, [])
    assert (train.groups, train.shares, train.weights) == ((range(7),), (1.0,), (1.0,))
    scenes = Scenes(3, count=7, sprites="known", side=64)
    copy = pickle.loads(pickle.dumps(train))  # as for a worker
    for i in (6, 0, 3, 5):
        sample, scene = copy.sample(i, RNG), scenes.sample(i, RNG)
        assert sample.image.equal(scene.image)
        assert train.image(i).equal(scene.image)
        assert (sample.caption, sample.key) == (scene.caption, scene.key)
        assert train.caption(i, RNG) == scene.caption


def test_masks_and_boxes_come_back(world: Path) -> None:
    train, _ = open_shards(world)
    for i in range(7):
        scene, mask, known = draw_scene(3, i), train.mask(i), train.metadata(i)
        for number, placed in enumerate(scene.objects, start=1):
            np.testing.assert_array_equal(mask == number, placed.mask)
        assert mask.max() <= len(scene.objects)
        assert known["words"] == [placed.word for placed in scene.objects]
        assert [tuple(box) for box in known["boxes"]] == [placed.box for placed in scene.objects]
        assert (known["relation"], known["background"]) == (scene.relation, scene.background)


def test_webdataset_reads_the_same(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")  # read once, at import
    import webdataset

    urls = [str(world / FIRST), str(world / SECOND)]
    streamed = list(webdataset.WebDataset(urls, shardshuffle=False))
    train, _ = open_shards(world)
    assert [item["__key__"] for item in streamed] == [entry.key for _, entry in train.rows]
    for i, item in enumerate(streamed):
        assert item["txt"].decode() == train.caption(i, RNG)
        for extension in ("png", "json", "mask.png"):
            assert item[extension] == train._read(i, extension)


def test_held_out_sprites_and_sets_that_are_none(tmp_path: Path) -> None:
    write_world(tmp_path / "w", 3, sprites="held_out")
    words = json.loads((tmp_path / "w" / "manifest.json").read_text())["shards"][0]["samples"]
    train, _ = open_shards(tmp_path / "w")
    assert len(words) == 3
    assert {word for i in range(3) for word in train.metadata(i)["words"]} <= set(HELD_OUT)
    with pytest.raises(ValueError, match="sprites=some: choose one of known, held_out, all"):
        write_world(tmp_path / "x", 3, sprites="some")
    with pytest.raises(ValueError, match="count=0: write at least one scene"):
        write_world(tmp_path / "x", 0)


def test_validation_is_disjoint(world: Path) -> None:
    train, held_out = open_shards(world, validation=2)
    keys = [[entry.key for _, entry in part.rows] for part in (train, held_out)]
    assert keys == [[f"scene-3-{i}" for i in range(5)], ["scene-3-5", "scene-3-6"]]
    assert (
        len({train.fingerprint(), held_out.fingerprint(), open_shards(world)[0].fingerprint()}) == 3
    )
    assert "validation=7 holds out all 7 samples" in refusal(world, validation=7)


def test_one_tar_of_a_folder(world: Path) -> None:
    train, _ = open_shards(world / SECOND)
    assert [entry.key for _, entry in train.rows] == ["scene-3-4", "scene-3-5", "scene-3-6"]
    assert not (world / "world-000001.manifest.json").exists()  # the folder's one served
    (world / "manifest.json").unlink()
    assert len(open_shards(world / SECOND)[0]) == 3
    assert (world / "world-000001.manifest.json").exists()
    assert len(open_shards(world)[0]) == 7


def test_manifest_is_made_beside_the_shards_or_in_the_cache(world: Path) -> None:
    place = world / "manifest.json"
    written = place.read_bytes()
    place.unlink()
    first = open_shards(world)[0].fingerprint()
    assert place.read_bytes() == written
    place.unlink()
    place.mkdir()  # nothing can be written there
    assert open_shards(world)[0].fingerprint() == first
    (kept,) = (world.parent / "cache" / "shards").iterdir()
    assert kept.read_bytes() == written
    flip(world / FIRST, 600)
    assert f"remove {kept}" in refusal(world)
    assert sorted(path.name for path in world.iterdir()) == ["manifest.json", FIRST, SECOND]


def test_a_flipped_bit_is_found(world: Path) -> None:
    train, _ = open_shards(world)
    _, entry = train.rows[5]
    flip(world / SECOND, entry.members["png"].offset + 200)
    train.sample(4, RNG)
    with pytest.raises(
        ValueError, match=rf"{SECOND}: the bytes of scene-3-5\.png .* copy it again"
    ):
        train.sample(5, RNG)
    flip(world / SECOND, entry.members["txt"].offset)
    with pytest.raises(ValueError, match=r"scene-3-5\.txt"):
        train.caption(5, RNG)
    assert f"{SECOND}: not the bytes that manifest.json lists; copy" in refusal(world)


def test_a_cut_shard_is_found(world: Path) -> None:
    train, _ = open_shards(world)
    whole = (world / FIRST).read_bytes()
    last = train.rows[3][1].members["png"]
    boundary = last.offset - 512  # webdataset reads three samples here and says nothing
    for length in (boundary, last.offset + 40, 0):
        (world / FIRST).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{FIRST}: .*scene-3-3"):
            train.sample(3, RNG)
        said = refusal(world)
        assert f"{FIRST}: {length} bytes, manifest.json lists {len(whole)} with 4 samples" in said
        assert "copy the shards again" in said
    (world / "manifest.json").unlink()
    for length in (boundary, last.offset + 40, 0):
        (world / FIRST).write_bytes(whole[:length])
        assert f"{FIRST}: truncated, damaged or compressed" in refusal(world)
    # closed again after the cut: only the manifest can tell, as above
    (world / FIRST).write_bytes(whole[:boundary] + bytes(1024))
    assert len(open_shards(world)[0]) == 6


def test_damaged_headers_and_other_files_are_found(world: Path) -> None:
    train, _ = open_shards(world)
    whole = (world / FIRST).read_bytes()
    header = train.rows[2][1].members["txt"].offset - 512
    (world / "manifest.json").unlink()
    (world / FIRST).write_bytes(whole[: header + 10] + b"???" + whole[header + 13 :])
    assert f"no end mark after byte {header}" in refusal(world)
    (world / FIRST).write_bytes(whole + whole)
    assert "no end mark" in refusal(world)
    (world / FIRST).write_bytes(bytes(len(whole)))
    assert "this shard has no sample" in refusal(world)
    (world / FIRST).write_bytes(b"\x1f\x8b" + whole)
    assert "copy it again as a plain .tar" in refusal(world)


def test_shards_that_come_or_go_are_named(world: Path) -> None:
    (world / SECOND).rename(world / "other.tar")
    said = refusal(world)
    assert f"{SECOND} is missing, other.tar is not in it; copy the shards again" in said
    (world / "manifest.json").write_text('{"version": 1}')
    assert "manifest.json: not a manifest of shards" in refusal(world)
    (world / "manifest.json").unlink()
    assert len(open_shards(world)[0]) == 7


PNG, TXT = ("a.png", png()), ("a.txt", b"a thing")


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (special("b.png", tarfile.SYMTYPE), "'b.png': a link or a special file"),
        (special("b.png", tarfile.LNKTYPE), "'b.png': a link or a special file"),
        (special("b.png", tarfile.FIFOTYPE), "'b.png': a link or a special file"),
        (special("b.png", tarfile.GNUTYPE_SPARSE), "'b.png': a link or a special file"),
        (("/etc/b.png", b""), "'/etc/b.png': an absolute or upward name"),
        (("c/../../b.png", b""), "an absolute or upward name"),
        (("..\\b.png", b""), "an absolute or upward name"),
        (("C:b.png", b""), "an absolute or upward name"),
        (("b\n.png", b""), "control characters"),
        (special("b.png", size=64 * 2**20 + 1), "67,108,865 bytes, the limit is 67,108,864"),
        (special("b.png", size=-512), "-512 bytes, the limit"),
        *[
            ((f"b.{kind}", b"x"), f"'b.{kind}': a pickle can run code")
            for kind in ("pyd", "pkl", "pickle", "pth", "PT", "json.pkl")
        ],
        (("b.npy", b"x"), "'b.npy': an unknown extension"),
        (("a.PNG", png()), "duplicate key 'a': it has two .png members"),
    ],
)
def test_members_that_are_refused(tmp_path: Path, member: Any, says: str) -> None:
    folder = pack(tmp_path / "in", PNG, TXT, member)
    said = refusal(folder, on_bad="skip")
    assert says in said
    assert "a.tar: " in said
    assert list(folder.iterdir()) == [folder / "a.tar"]


def test_what_a_mac_and_windows_leave_in_a_tar_is_passed_over(tmp_path: Path) -> None:
    """A tar of a folder made on a Mac has an AppleDouble file beside each file, with its name."""
    double = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
    left = [
        "./._photos", "./photos/._0.png", "./photos/.DS_Store", "photos/._.DS_Store",
        "__MACOSX/photos/._0.png", "__MACOSX/0.png", "photos/.hidden.png", ".Trashes/0.png",
        "photos/PaxHeaders.1234/0.png", "PaxHeader/0.txt", "photos/Thumbs.db", "photos/desktop.ini",
        "photos/Icon\r", ".DS_Store", "._0.pkl",
    ]  # fmt: skip
    members: list[Any] = [(name, double) for name in left] + [(".localized", b"")]
    own = [("./photos/0.png", png()), ("./photos/._0.txt", double), ("./photos/0.txt", b"a thing")]
    train, _ = open_shards(pack(tmp_path / "in", *members, *own, *members))
    assert [entry.key for _, entry in train.rows] == ["./photos/0"]
    assert train.sample(0, RNG).caption == "a thing"
    both = tmp_path / "pax"
    both.mkdir()
    tars.pack(both / "a.tar", *members, *own, pax=True)
    assert len(open_shards(both)[0]) == 1


def test_a_hidden_name_hides_nothing_that_is_refused(tmp_path: Path) -> None:
    assert "an absolute or upward name" in refusal(
        pack(tmp_path / "a", PNG, TXT, ("._a/../../b", b""))
    )
    assert "the limit is" in refusal(pack(tmp_path / "b", PNG, TXT, special("._b.png", size=-512)))


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    folder = pack(tmp_path / "in", PNG, TXT, ("b.png", png()), ("b.txt", b"b"), ("a.json", b"{}"))
    assert "a.tar: duplicate key 'a', already in a.tar" in refusal(folder)
    pack(folder, PNG, TXT)
    (folder / "b.tar").write_bytes((folder / "a.tar").read_bytes())
    assert "b.tar: duplicate key 'a', already in a.tar" in refusal(folder)


def test_samples_that_cannot_be_used_end_the_run_or_are_named(tmp_path: Path) -> None:
    folder = pack(
        tmp_path / "in",
        PNG,
        TXT,
        ("b.txt", b"no image"),
        ("c.png", png()),
        ("d.png", png()),
        ("d.json", b'{"url": "elsewhere"}'),
        ("e.png", png()[:200]),
        ("e.txt", b"cut"),
        ("f.jpg", png()),
        ("f.png", png()),
        ("f.txt", b"two images"),
        ("g.png", png()),
        ("g.txt", b"\xff"),
        ("h.png", png()),
        ("h.json", b"{"),
        ("i.png", png()),
        ("i.json", b"[]"),
        ("j.png", png()),
        ("j.txt", b"mask"),
        ("j.mask.png", b"no"),
    )
    said = refusal(folder)
    assert "9 of 10 samples cannot be used, data.on_bad=skip leaves them out" in said
    for reason in (
        "a.tar: b: 0 images among .txt; a sample has one image",
        "a.tar: c: an image without a caption; add c.txt after it",
        "a.tar: d: an image without a caption",
        "a.tar: e.png: truncated or damaged",
        "a.tar: f: 2 images among .jpg, .png, .txt",
        "a.tar: g.txt: not UTF-8 at byte 0",
        "a.tar: h.json: not readable as JSON",
        "a.tar: i.json: not an object",
        "a.tar: j.mask.png: damaged or no PNG",
    ):
        assert reason in said
    train, _ = open_shards(folder, on_bad="skip")
    assert [entry.key for _, entry in train.rows] == ["a"]
    assert len(train.skipped) == 9
    pack(tmp_path / "bad", ("c.png", png()))
    assert "1 of 1 samples cannot be used" in refusal(tmp_path / "bad", on_bad="skip")


def test_masks_of_another_size_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("P", (20, 24)).save(buffer, "PNG")
    folder = pack(tmp_path / "in", PNG, TXT, ("a.mask.png", buffer.getvalue()))
    assert "a.mask.png: 20x24 P; a mask is grey, or numbers objects" in refusal(folder)
    assert "8 bits and 24x20" in refusal(folder)


def mask_png(pixels: np.ndarray, mode: str = "L") -> bytes:
    mask = Image.fromarray(pixels.astype(np.uint8))
    if mode == "P":
        mask = Image.frombytes("P", mask.size, pixels.astype(np.uint8).tobytes())
        mask.putpalette([0, 0, 0, 255, 255, 255])
    buffer = io.BytesIO()
    mask.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_grey_mask_weighs_the_loss_as_beside_a_photo(tmp_path: Path, mode: str) -> None:
    half = np.zeros((20, 24))
    half[:, 12:] = 255
    own = (("a.png", png(1)), ("a.txt", b"a"), ("a.mask.png", mask_png(half, mode)))
    train, _ = open_shards(pack(tmp_path / "in", *own, ("b.png", png(2)), ("b.txt", b"b")))
    weights = train.loss_mask(0)
    assert weights.shape == (1, 16, 16)
    assert not weights[..., :8].any() and bool((weights[..., 8:] == 1).all())
    sample = train.sample(0, RNG)
    assert sample.mask.equal(weights) and train.sample(1, RNG).mask is None


def test_a_mask_with_a_palette_weighs_nothing(world: Path, tmp_path: Path) -> None:
    train, _ = open_shards(world)
    assert [train.loss_mask(i) for i in range(7)] == [None] * 7
    own = (PNG, TXT, ("a.mask.png", mask_png(np.ones((20, 24)), "P")))
    assert open_shards(pack(tmp_path / "in", *own))[0].loss_mask(0) is None


def test_a_black_mask_is_a_bad_sample(tmp_path: Path) -> None:
    folder = pack(tmp_path / "in", PNG, TXT, ("a.mask.png", mask_png(np.zeros((20, 24)))))
    assert "a.mask.png: all black, so nothing of its photo would be learned" in refusal(folder)


def test_caption_from_json_and_members_passed_over(tmp_path: Path) -> None:
    folder = pack(
        tmp_path / "in",
        special("./", tarfile.DIRTYPE),
        ("./._a.png", b"what a Mac adds"),
        ("./a.PNG", png(1)),
        ("./a.json", b'{"caption": " a thing ", "url": "x"}'),
        ("./a.cls", b"7"),
    )
    assert "list it in data.ignore" in refusal(folder)
    train, _ = open_shards(folder, ignore=(".cls",))
    assert train.sample(0, RNG).caption == "a thing"
    assert train.metadata(0)["url"] == "x"
    assert train.mask(0) is None
    assert (train.rows[0][1].width, train.rows[0][1].height) == (24, 20)


@pytest.mark.parametrize(
    "value", ["pipe:cat a.tar", "https://host/a.tar", "s3://bucket/a", "file:a.tar", "s3:/bucket"]
)
def test_commands_and_remote_addresses_are_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.shards=.*copy the shards to a local disk"):
        build_section(Shards, {"shards": value}, "data")


def test_paths_without_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    cases = (
        ("none", "no such file or folder"),
        ("", "no .tar in this"),
        ("a.tar.gz", "not a .tar"),
    )
    for name, says in cases:
        with pytest.raises(ValueError, match=rf"{says}.*expected a folder of \.tar"):
            Shards(shards=tmp_path / name)


def test_writer_refuses_what_readers_would_not_understand(tmp_path: Path, world: Path) -> None:
    good = {"png": png(), "txt": b"a thing"}
    cases: tuple[tuple[list[Record], str], ...] = (
        ([], "no record"),
        ([("a.b", good)], "first dot"),
        ([("../a", good)], "first dot"),
        ([("a", {**good, "pkl": b""})], "unknown extension"),
        ([("a", good), ("a", good)], "duplicate key"),
        ([("a", {"png": png()})], "1 samples could not be read back.*without a caption"),
    )
    for records, says in cases:
        with pytest.raises(ValueError, match=says):
            write_shards(tmp_path / "out", records, per_shard=1)
    with pytest.raises(ValueError, match="per_shard=0"):
        write_shards(tmp_path / "out", [("a", good)], per_shard=0)
    with pytest.raises(ValueError, match="world: exists and is not empty; give a new folder"):
        write_world(world, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    (tmp_path / "out").mkdir()
    assert write_shards(tmp_path / "out", [("a", good)], per_shard=5)[0].name == "shard-000000.tar"


def test_a_full_disk_or_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Record]:
        yield "a", {"png": png(), "txt": b"a thing"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "out", interrupted(), per_shard=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_world(tmp_path / "out", 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_source_is_found_by_name_and_imports_no_torch() -> None:
    assert "shards" in Source.names()
    assert "write_shards" not in Source.names()
    assert Source.find("shards") is Shards
    code = "import sys, trainer.data.tars.write_shards; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(shards.__file__).parents[3])


def test_a_pattern_names_shards(world: Path) -> None:
    both, _ = open_shards(world)
    pattern = world / "world-{000000..000001}.tar"
    found, _ = open_shards(pattern)
    assert [found.key(i) for i in range(len(found))] == [both.key(i) for i in range(len(both))]
    assert found.sample(0, RNG).image.equal(both.sample(0, RNG).image)
    second, _ = open_shards(world / "world-{000001,}.tar".replace(",}", ",000000}"))
    assert second.key(0) == open_shards(world / SECOND)[0].key(0)
    one, _ = open_shards(world / "world-00000{1..1}.tar")
    assert len(one) == len(open_shards(world / SECOND)[0])
    assert "world-000002.tar missing; copy" in refusal(world / "world-{000000..000002}.tar")
    assert "braces hold a range or a list" in refusal(world / "world-{a}.tar")
    assert "is not the name of a .tar" in refusal(world / "world-{0..1}.zip")
    loaded = load_recipe(["recipe=linear_swap", "data.source=shards", f"data.shards={pattern}"])
    assert loaded.data.shards == pattern  # type: ignore[attr-defined]


def test_a_pattern_without_a_manifest_makes_its_own(world: Path) -> None:
    (world / "manifest.json").unlink(missing_ok=True)
    pattern = world / "world-{000000..000001}.tar"
    first, _ = open_shards(pattern)
    again, _ = open_shards(pattern)
    assert first.fingerprint() == again.fingerprint()
    with (world / SECOND).open("r+b") as file:
        file.truncate(1024)
    assert "1024 bytes" in refusal(pattern)


def test_what_was_found_is_told_when_it_is_opened(world: Path) -> None:
    source = Shards(shards=world)
    train, _ = open_shards(world)
    (told,) = found_when_opened(source, train)
    count = len(train)
    assert told == (f"data: {count} training samples; captions: {count} from .txt; masks: {count}")
    scenes = Source.find("world")(count=3)
    assert found_when_opened(scenes, Scenes(0, count=3, sprites="all", side=8)) == [
        "data: 3 training samples"
    ]
