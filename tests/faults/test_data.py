"""Damage to shards and pictures that are no plain photos: found and named, or read as documented.
None of it trains in silence, and no number of samples makes a rank wait."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import on_two_ranks

from trainer.__main__ import main
from trainer.config.load import load_recipe
from trainer.data.loader import Planned
from trainer.data.source import Needs
from trainer.data.sources.folder import Folder
from trainer.data.sources.shards import Shards
from trainer.data.tars.write_shards import write_shards
from trainer.media.images import MAX_PIXELS
from trainer.training.checkpoint_files import every_checkpoint, verified
from trainer.training.fit import fit

pytestmark = pytest.mark.faults
ONE, TWO = "shard-000000.tar", "shard-000001.tar"
RECIPE = """
data: {{source: shards, shards: {shards}}}
methods: {{selective: {{sites: cross, projections: [k, v]}}}}
run: {{steps: 3, batch_size: 2, resolution: 32, checkpoint_every: 1, validate_every: 0}}
tracker: none
"""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def make(folder: Path, *counts: int) -> Path:
    """Shards with so many samples each, s0, s1, ... through all of them."""
    folder.mkdir(parents=True)
    total = 0
    for number, count in enumerate(counts):
        part = folder.parent / f".{folder.name}-{number}"
        names = [f"s{i}" for i in range(total, total + count)]
        members = [{"png": encoded(noise(int(k[1:]))), "txt": f"thing {k}".encode()} for k in names]
        (path,) = write_shards(part, zip(names, members, strict=True), per_shard=count)
        path.rename(folder / f"shard-{number:06d}.tar")
        total += count
    return folder


def needs(place: Path) -> Needs:
    cache = place.parent / "cache"
    return Needs(32, 4, lambda prompts, seed, guidance: (), cache, lambda: "tiny")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """s0 to s3 and s4 to s6 in two shards, with their manifest."""
    folder = make(tmp_path / "shards", 4, 3)
    assert main(["data", "build", f"shards={folder}"]) == 0
    return folder


def part(folder: Path, key: str, extension: str) -> tuple[Path, Any]:
    """The shard, and where a member lies in it."""
    train, _ = Shards(shards=folder).open(needs(folder))
    name, entry = next(row for row in train.rows if row[1].key == key)
    return folder / name, entry.members[extension]


def edit(path: Path, at: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)


def cut_inside(folder: Path) -> None:
    path, png = part(folder, "s2", "png")
    path.write_bytes(path.read_bytes()[: png.offset + 100])


def cut_between(folder: Path) -> None:
    """Right before a header: a reader of streams sees a shorter archive, well-formed."""
    path, png = part(folder, "s2", "png")
    path.write_bytes(path.read_bytes()[: png.offset - 512])


def cut_and_closed(folder: Path) -> None:
    path, png = part(folder, "s2", "png")
    path.write_bytes(path.read_bytes()[: png.offset - 512] + bytes(1024))


def flipped_picture(folder: Path) -> None:
    path, png = part(folder, "s2", "png")
    edit(path, png.offset + 60, bytes([path.read_bytes()[png.offset + 60] ^ 1]))


def flipped_caption(folder: Path) -> None:
    path, txt = part(folder, "s2", "txt")
    edit(path, txt.offset, b"T")


def broken_header(folder: Path) -> None:
    path, png = part(folder, "s2", "png")
    edit(path, png.offset - 512 + 3, b"???")


def wrong_size(folder: Path) -> None:
    """A header that says 40 bytes, with a checksum that is right."""
    path, png = part(folder, "s2", "png")
    header = bytearray(path.read_bytes()[png.offset - 512 : png.offset])
    header[124:136] = b"%011o\0" % 40
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    edit(path, png.offset - 512, bytes(header))


def repacked(folder: Path, keep: Callable[[str], int]) -> None:
    """The first shard again, each member as often as `keep` says."""
    with tarfile.open(folder / ONE) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    with tarfile.open(folder / ONE, "w") as archive:
        for info, data in members:
            for _ in range(keep(info.name)):
                archive.addfile(info, io.BytesIO(data))


def missing_member(folder: Path) -> None:
    repacked(folder, lambda name: int(name != "s2.txt"))


def missing_sample(folder: Path) -> None:
    repacked(folder, lambda name: int(not name.startswith("s2.")))


def duplicate_member(folder: Path) -> None:
    repacked(folder, lambda name: 2 if name == "s2.png" else 1)


def duplicate_key(folder: Path) -> None:
    (folder / ONE).write_bytes((folder / ONE).read_bytes().replace(b"s3.", b"s1."))
    _sum_anew(folder / ONE)


def _sum_anew(path: Path) -> None:
    """Right checksums in headers whose names were edited."""
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)


def zeroed(folder: Path) -> None:
    (folder / ONE).write_bytes(bytes((folder / ONE).stat().st_size))


def empty(folder: Path) -> None:
    (folder / ONE).write_bytes(b"")


def missing_shard(folder: Path) -> None:
    (folder / ONE).unlink()


def extra_shard(folder: Path) -> None:
    (folder / "more.tar").write_bytes((folder / TWO).read_bytes())


def exchanged(folder: Path) -> None:
    (folder / ONE).rename(folder / "held")
    (folder / TWO).rename(folder / ONE)
    (folder / "held").rename(folder / TWO)


def grown(folder: Path) -> None:
    with (folder / ONE).open("ab") as file:
        file.write((folder / TWO).read_bytes())


# what `verify` says of it, and what opening says where there is no manifest yet (None: no more is
# there to tell it from other data)
DAMAGE: list[tuple[Callable[[Path], None], tuple[str, ...], str | None]] = [
    (
        cut_inside,
        (f"{ONE}: truncated, damaged", "s2.png is truncated", "s3.txt is truncated"),
        "truncated",
    ),
    (cut_between, (f"{ONE}: truncated, damaged", "s2.png is truncated"), "no end mark"),
    (cut_and_closed, (f"{ONE}: ", "sample s2 is missing", "sample s3 is missing"), None),
    (flipped_picture, (f"{ONE}: s2.png",), "s2.png: truncated or damaged"),
    (flipped_caption, (f"{ONE}: s2.txt has other bytes",), None),
    (broken_header, (f"{ONE}: truncated, damaged or compressed",), "no end mark"),
    (wrong_size, (f"{ONE}: truncated, damaged or compressed",), "no end mark"),
    (missing_member, (f"{ONE}: s2: an image without a caption",), "s2: an image without a caption"),
    (missing_sample, (f"{ONE}: sample s2 is missing",), None),
    (duplicate_member, (f"{ONE}: duplicate key 's2'",), "duplicate key 's2'"),
    (duplicate_key, (f"{ONE}: duplicate key 's1'",), "duplicate key 's1'"),
    (
        zeroed,
        (f"{ONE}: this shard has no sample", "s0.png has other bytes"),
        "this shard has no sample",
    ),
    (empty, (f"{ONE}: 0 bytes", "s0.png is truncated"), "truncated, damaged"),
    (missing_shard, (f"{ONE}: the shard is missing, and 4 samples with it",), None),
    (extra_shard, ("more.tar: not in manifest.json",), "duplicate key"),
    (exchanged, (f"{ONE}: ", "sample s4 was not there", "sample s0 is missing"), None),
    (grown, (f"{ONE}: truncated, damaged", "and had"), "no end mark"),
]
damaged = pytest.mark.parametrize(
    ("spoil", "says", "unlisted"), DAMAGE, ids=[spoil.__name__ for spoil, *_ in DAMAGE]
)


@damaged
def test_damage_to_shards_is_found(
    spoil: Callable[[Path], None],
    says: tuple[str, ...],
    unlisted: str | None,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, _ = Shards(shards=place).open(needs(place))
    rng = np.random.default_rng(0)
    whole = [good.sample(i, rng) for i in range(len(good))]
    spoil(place)

    # a run that is going on: each sample is what it was, or an error
    lost = 0
    for i, before in enumerate(whole):
        try:
            now = good.sample(i, rng)
        except (ValueError, OSError) as error:
            assert ONE in str(error) or TWO in str(error)
            lost += 1
            continue
        assert now.image.equal(before.image) and now.caption == before.caption
    if spoil not in (broken_header, wrong_size, duplicate_key, extra_shard, grown):
        assert lost  # in those the bytes of every sample are still where they were

    # a run that begins
    with pytest.raises(ValueError, match=r"shard-00000[01]\.tar|more\.tar"):
        Shards(shards=place).open(needs(place))

    # one that would skip what is bad
    with pytest.raises(ValueError, match=r"shard-00000[01]\.tar|more\.tar"):
        Shards(shards=place, on_bad="skip").open(needs(place))

    capsys.readouterr()
    assert main(["data", "verify", f"shards={place}"]) == 65
    told = capsys.readouterr().out
    for words in says:
        assert words in told

    if unlisted is not None:
        (place / "manifest.json").unlink()
        with pytest.raises(ValueError, match=unlisted.replace(".", r"\.")):
            Shards(shards=place).open(needs(place))


@pytest.fixture
def words(place: Path, tiny_folder: Path) -> list[str]:
    path = place.parent / "mine.yaml"
    path.write_text(RECIPE.format(shards=place))
    return [f"recipe={path}", f"backbone={tiny_folder}"]


def test_damage_while_a_run_is_going_on_ends_it(
    words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two steps a bit of every picture flips; the third is not done."""
    original = Planned.__getitem__

    def getitem(self: Planned, step: int) -> Any:
        if step == 2:
            for name, entry in self.dataset.rows:  # type: ignore[attr-defined]
                at = entry.members["png"].offset + 60
                edit(place / name, at, bytes([(place / name).read_bytes()[at] ^ 1]))
        return original(self, step)

    monkeypatch.setattr(Planned, "__getitem__", getitem)
    run = place.parent / "run"
    loaded = load_recipe([*words, "run.cache_latents=false"])
    with pytest.raises(ValueError, match=r"shard-00000\d\.tar: the bytes of s\d\.png have changed"):
        fit(loaded, run)
    assert not (run / "adapter.safetensors").exists()
    assert [verified(path).step for path in every_checkpoint(run / "checkpoints")] == [2, 1]


BASE = Image.new("RGB", (48, 32), (200, 30, 40))
BASE.paste((20, 60, 210), (24, 0, 48, 32))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb() -> bytes:
    side = int(MAX_PIXELS**0.5) + 1
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(side * (side // 8 + 2)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """64 KB of compressed text that become 64 MB."""
    data = encoded(BASE)
    packed = zlib.compressobj(9)
    text = b"".join(packed.compress(bytes(2**20)) for _ in range(64)) + packed.flush()
    return data[:33] + chunk(b"zTXt", b"a\0\0" + text) + data[33:]


def corrupt_chunk() -> bytes:
    data = bytearray(encoded(noise(1)))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


def animated() -> bytes:
    more = [Image.new("RGB", (48, 32), "green")]
    return encoded(BASE, "WEBP", save_all=True, append_images=more, duration=100)


REFUSED = {
    "truncated": (encoded(noise(0), "JPEG")[:500], "jpg", "truncated or damaged"),
    "wrong_magic": (b"GIF89a" + bytes(100), "png", "a GIF"),
    "text": (b"<html>404 not found</html>", "jpg", "not a readable image"),
    "empty": (b"", "png", "the file is empty"),
    "bomb": (bomb(), "png", "pixels, the limit is"),
    "text_bomb": (text_bomb(), "png", "truncated or damaged"),
    "dot": (encoded(Image.new("RGB", (1, 1))), "png", "1x1 pixels"),
    "corrupt_chunk": (corrupt_chunk(), "png", "truncated or damaged"),
    "animated": (animated(), "webp", "animated"),
}


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(BASE.transpose(Image.Transpose.ROTATE_90), exif=exif)


def clear_palette() -> bytes:
    """The left half is a colour of the palette that is transparent: white."""
    image = BASE.quantize(2)
    index = image.getpixel((5, 5))
    assert isinstance(index, int)
    return encoded(image, transparency=index)


def white_left() -> Image.Image:
    image = BASE.copy()
    image.paste("white", (0, 0, 24, 32))
    return image


def deep_grey() -> bytes:
    """16 bits of grey: 3/4 of the range, then 1/4."""
    values = np.full((32, 48), 49151, np.uint16)
    values[:, 24:] = 16384
    return encoded(Image.fromarray(values))


def grey() -> Image.Image:
    image = Image.new("RGB", (48, 32), (191, 191, 191))
    image.paste((64, 64, 64), (24, 0, 48, 32))
    return image


CONVERTED = {
    "cmyk": (encoded(BASE.convert("CMYK"), "JPEG", quality=95), "jpg", BASE, 12),
    "deep_grey": (deep_grey(), "png", grey(), 1),
    "clear_palette": (clear_palette(), "png", white_left(), 2),
    "turned": (turned(), "png", BASE, 0),
}


def captured(kind: str, data: bytes, suffix: str, folder: Path, **options: Any) -> Any:
    """A good picture and this one, as photos or as a shard, opened."""
    folder.mkdir()
    members = {f"a.{suffix}": data, "a.txt": b"this one", "good.png": encoded(noise(9))}
    members["good.txt"] = b"a good one"
    if kind == "folder":
        for name, content in members.items():
            (folder / name).write_bytes(content)
        return Folder(folder=folder, **options).open(needs(folder))[0]
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return Shards(shards=folder, **options).open(needs(folder))[0]


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_pictures_are_refused_or_left_out_by_name(name: str, kind: str, tmp_path: Path) -> None:
    data, suffix, says = REFUSED[name]
    with pytest.raises(ValueError, match=rf"(?s)a\.{suffix}: .*{says}"):
        captured(kind, data, suffix, tmp_path / "one")
    left = captured(kind, data, suffix, tmp_path / "other", on_bad="skip")
    assert len(left) == 1 and left.caption(0, np.random.default_rng(0)) == "a good one"
    (reason,) = left.skipped
    assert f"a.{suffix}" in reason and says in reason


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("name", CONVERTED)
def test_pictures_of_other_kinds_are_read_as_documented(
    name: str, kind: str, tmp_path: Path
) -> None:
    data, suffix, expected, within = CONVERTED[name]
    train = captured(kind, data, suffix, tmp_path / "in")
    wanted = np.asarray(expected.crop((8, 0, 40, 32)), int)  # the centre, 32 x 32
    got = np.asarray((train.image(0).permute(1, 2, 0) + 1) * 127.5).round().astype(int)
    apart = abs(got - wanted)
    apart[:, 14:18] = 0  # JPEG blurs the edge
    assert apart.max() <= within


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("counts", [(1,), (1, 2, 4), (5, 1)], ids=str)
def test_any_number_of_samples_in_any_number_of_shards(
    counts: tuple[int, ...], ranks: int, tmp_path: Path
) -> None:
    """Every rank has as many batches as the run has steps, and together they are one global order,
    in which no sample comes again before all have come."""
    from trainer.data.plan import StepPlan

    train, _ = Shards(shards=make(tmp_path / "in", *counts)).open(needs(tmp_path / "in"))
    plan = StepPlan(((0, len(train)),), (1.0,), (1.0,), 4, 7)
    parts = [Planned(train, plan, None, rank, ranks) for rank in range(ranks)]
    keys = [[batch for part in parts for batch in part[step].keys] for step in range(5)]
    assert all(len(each) == 4 for each in keys)
    assert keys == [Planned(train, plan, None, 0, 1)[step].keys for step in range(5)]
    drawn, total = [key for each in keys for key in each], sum(counts)
    epochs = [drawn[i : i + total] for i in range(0, len(drawn) - total + 1, total)]
    assert all(len(set(epoch)) == total for epoch in epochs)


@pytest.mark.ddp
@pytest.mark.sampled(1)
@pytest.mark.parametrize("counts", [(1,), (1, 2, 4)], ids=["one_sample", "uneven_shards"])
def test_two_ranks_with_two_workers_each_end_together(
    counts: tuple[int, ...], tmp_path: Path, tiny_folder: Path
) -> None:
    make(tmp_path / "in", *counts)
    (tmp_path / "mine.yaml").write_text(RECIPE.format(shards=tmp_path / "in"))
    words = [
        "fit", f"recipe={tmp_path / 'mine.yaml'}", f"backbone={tiny_folder}",
        f"run={tmp_path / 'run'}", "run.devices=2", "run.accelerator=cpu", "run.workers=2",
        "run.cache_latents=false", "run.steps=2",
    ]  # fmt: skip
    done = on_two_ranks(*words, printed=tmp_path / "printed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    last = verified(every_checkpoint(tmp_path / "run" / "checkpoints")[0])
    assert (last.step, last.manifest["world_size"]) == (2, 2)
