"""The source `stream` on a disk: the order that no number of readers changes, img2dataset's layout,
captions, masks and latents, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from tars import pack

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.data.loader import Batch, Planned, loader
from trainer.data.source import Needs
from trainer.data.sources.shards import Shards
from trainer.data.sources.stream import Stream
from trainer.data.streams.latent_member import npy_bytes
from trainer.data.streams.raw_sample import facts_json
from trainer.data.streams.stream_data import StreamData
from trainer.media.images import ImageError
from trainer.training.build import step_plan

RNG = np.random.default_rng(0)
SIZES = (5, 3, 7, 1, 4, 6, 2, 8, 3, 5)
TOTAL = sum(SIZES)


def png(red: int = 0, size: tuple[int, int] = (40, 32)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, (red % 256, 0, 0)).save(held, "PNG")
    return held.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards of different sizes."""
    folder, number = tmp_path_factory.mktemp("ten"), 0
    for shard, size in enumerate(SIZES):
        members = []
        for _ in range(size):
            key = f"s{number:03d}"
            members += [(f"{key}.png", png(number)), (f"{key}.txt", f"number {number}".encode())]
            number += 1
        pack(folder / f"{shard:03d}.tar", *members)
    return folder


def needs(tmp_path: Path, batch: int = 4, **more: Any) -> Needs:
    return Needs(32, 4, lambda *_: (), tmp_path, lambda: "", batch=batch, seed=5, **more)


def opened(source: Stream, tmp_path: Path, **more: Any) -> StreamData:
    return source.open(needs(tmp_path, **more))[0]


def batches(data: StreamData, rank: int = 0, ranks: int = 1, batch: int = 4) -> Planned:
    recipe = load_recipe(
        ["recipe=lora", "data.prior_weight=0", f"run.batch_size={batch}", "run.seed=5"]
    )
    return Planned(data, step_plan(recipe, data), None, rank, ranks)


def one(folder: Path, *members: tuple[str, bytes]) -> Stream:
    """A stream of one shard."""
    return Stream(urls=(str(pack(folder / "one.tar", *members)),))


def test_every_sample_once_an_epoch_in_another_order(ten: Path, tmp_path: Path) -> None:
    data = opened(Stream(urls=(f"{ten}/{{000..009}}.tar",)), tmp_path)
    keys = [data.sample(i, RNG).key for i in range(3 * TOTAL)]
    epochs = [keys[i : i + TOTAL] for i in range(0, 3 * TOTAL, TOTAL)]
    assert all(sorted(epoch) == [f"s{n:03d}" for n in range(TOTAL)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    found = data.sample(5, RNG)
    assert found.caption == f"number {int(keys[5][1:])}"
    assert data.image(5)[0, 0, 0] == pytest.approx(int(keys[5][1:]) / 127.5 - 1)
    assert len(data) == TOTAL and data.shards == 10


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 2), (4, 3), (2, 1)])
def test_ranks_and_workers_change_nothing(
    ten: Path, tmp_path: Path, ranks: int, workers: int
) -> None:
    source = Stream(urls=(str(ten),), shuffle=20)
    whole = batches(opened(source, tmp_path))
    wanted = [whole[step].keys for step in range(25)]
    found: list[list[str]] = [[] for _ in wanted]
    for rank in range(ranks):
        for worker in range(workers):
            items = batches(opened(source, tmp_path), rank, ranks)
            for step in range(worker, 25, workers):
                found[step] = [*found[step], *items[step].keys]
    key = sorted if workers > 1 else list  # ranks come worker after worker
    assert [key(keys) for keys in found] == [key(keys) for keys in wanted]


def test_it_resumes_at_any_sample_and_reads_little_again(
    ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Stream(urls=(str(ten),), shuffle=16)
    whole = batches(opened(source, tmp_path))
    wanted = [whole[step].keys for step in range(30)]
    for start in (1, 7, 10, 23):
        items = batches(opened(source, tmp_path))
        assert [items[step].keys for step in range(start, 30)] == wanted[start:]


def test_real_data_workers_give_the_same(ten: Path, tmp_path: Path) -> None:
    items = batches(opened(Stream(urls=(str(ten),)), tmp_path))
    wanted = [items[step].keys for step in range(3, 9)]
    found = [batch.keys for batch in loader(items, 9, start=3, workers=2)]
    assert found == wanted


def test_the_seed_and_the_buffer_are_part_of_the_order(ten: Path, tmp_path: Path) -> None:
    def keys(shuffle: int, seed: int) -> list[str]:
        needed = Needs(32, 4, lambda *_: (), tmp_path, lambda: "", batch=4, seed=seed)
        data, _ = Stream(urls=(str(ten),), shuffle=shuffle).open(needed)
        return [data.sample(i, RNG).key for i in range(TOTAL)]

    assert keys(1000, 0) != keys(0, 0) != keys(0, 1)
    assert keys(1000, 0) == keys(1000, 0)


def test_a_mixture_has_its_weights_in_every_batch(ten: Path, tmp_path: Path) -> None:
    few = pack(tmp_path / "few.tar", ("f0.png", png()), ("f0.txt", b"few"))
    source = Stream(mixture={"many": {"urls": str(ten), "weight": 3}, "few": {"urls": [str(few)]}})  # type: ignore[arg-type]
    data = opened(source, tmp_path)
    items = batches(data)
    keys = [items[step].keys for step in range(44)]
    assert all(sum(key == "f0" for key in each) == 1 for each in keys)
    own = [key for each in keys for key in each if key != "f0"]
    assert sorted(own[:TOTAL]) == [f"s{n:03d}" for n in range(TOTAL)]
    assert items[0].weights.sum() == pytest.approx(4)


def test_the_last_samples_are_held_out(ten: Path, tmp_path: Path) -> None:
    train, held = Stream(urls=(str(ten),), validation=7).open(needs(tmp_path))
    assert held is not None
    kept = [held.key(i) for i in range(len(held))]
    assert kept == [f"s{n:03d}" for n in range(TOTAL - 7, TOTAL)]
    own = [train.sample(i, RNG).key for i in range(len(train))]
    assert sorted(own) == [f"s{n:03d}" for n in range(TOTAL - 7)]
    assert held.image(0).dtype == torch.float32 and held.fixed
    with pytest.raises(ValueError, match=f"validation={TOTAL} holds out all"):
        Stream(urls=(str(ten),), validation=TOTAL).open(needs(tmp_path))


def test_a_batch_is_that_of_the_indexed_source(ten: Path, tmp_path: Path) -> None:
    """Of odd sizes: the cut, the crop and the pixels are the same."""
    members = [("a.png", png(9, (100, 37))), ("a.txt", b" an a ")]
    place = pack(tmp_path / "x.tar", *members)
    index, _ = Shards(shards=place).open(needs(tmp_path))
    data = opened(Stream(urls=(str(place),)), tmp_path)
    one, other = index.sample(0, RNG), data.sample(0, RNG)
    assert other.image.dtype == torch.uint8
    assert torch.equal(one.image, data.image(0)) and one.caption == other.caption == "an a"
    assert index.crop(0) == data.crop(0) == other.crop  # type: ignore[attr-defined]
    batch = batches(data, batch=1)[0].to(torch.device("cpu"))
    assert batch.pixels is not None and torch.equal(batch.pixels[0], one.image)


def test_masks_weigh_and_palettes_do_not(tmp_path: Path) -> None:
    grey, palette = Image.new("L", (32, 32)), Image.new("P", (32, 32), 1)
    grey.paste(255, (0, 0, 16, 32))
    held = [io.BytesIO(), io.BytesIO()]
    for image, each in zip((grey, palette), held, strict=True):
        image.save(each, "PNG")
    source = one(
        tmp_path, ("a.png", png(1, (32, 32))), ("a.txt", b"a"), ("a.mask.png", held[0].getvalue()),
        ("b.png", png(2, (32, 32))), ("b.txt", b"b"), ("b.mask.png", held[1].getvalue()),
    )  # fmt: skip
    data = opened(source, tmp_path)
    found = {data.sample(i, RNG).key: data.sample(i, RNG).mask for i in range(2)}
    assert found["b"] is None and found["a"] is not None
    assert found["a"].shape == (1, 8, 8) and found["a"].sum() == 32


def img2dataset(folder: Path, *, stats: bool = True, listed: bool = True, wrong: int = 0) -> Path:
    """Two shards as img2dataset writes them; the second picture of each failed."""
    folder.mkdir()
    for shard in range(2):
        keys = [f"{shard:05d}{n:04d}" for n in (0, 2)]
        members = []
        for key in keys:
            facts = json.dumps({"key": key, "status": "success", "alt": f"json {key}"}).encode()
            members += [(f"{key}.jpg", png()), (f"{key}.json", facts)]
            members += [(f"{key}.txt", f"txt {key}".encode())]
        if not stats:
            members = [member for member in members if not member[0].endswith(".json")]
        pack(folder / f"{shard:05d}.tar", *members)
        every = [keys[0], f"{shard:05d}0001", keys[1]]
        if listed:
            table = {
                "key": every,
                "status": ["success", "failed_to_download", "success"],
                "alt": [f"parquet {key}" for key in every],
                "width": [1, 2, 3],
            }
            parquet.write_table(pyarrow.table(table), folder / f"{shard:05d}.parquet")
        if stats:
            said = {"count": 3, "successes": 2 + wrong}
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps(said))
    return folder


def captions(data: StreamData) -> list[str]:
    return sorted(data.sample(i, RNG).caption for i in range(len(data)))


KEYS = ["000000000", "000000002", "000010000", "000010002"]


def test_img2dataset_is_read_as_it_is(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "d")
    assert captions(opened(Stream(urls=(str(folder),)), tmp_path)) == [f"txt {k}" for k in KEYS]
    data = opened(Stream(urls=(str(folder),), caption_key="alt"), tmp_path)
    assert captions(data) == [f"json {k}" for k in KEYS]
    with pytest.raises(ImageError, match=r"json: no text, or list of texts, by the name nothing"):
        captions(opened(Stream(urls=(str(folder),), caption_key="nothing"), tmp_path))


def test_captions_by_key_beside_a_shard(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "d", stats=False)
    data = opened(Stream(urls=(str(folder),), caption_key="alt"), tmp_path)
    assert captions(data) == [f"parquet {k}" for k in KEYS]
    with pytest.raises(ValueError, match=r"no column nothing; it has key, status, alt, width"):
        captions(opened(Stream(urls=(str(folder),), caption_key="nothing"), tmp_path))
    with pytest.raises(ValueError, match=r"the width of 0000[01]0000 is no text"):
        sorted(opened(Stream(urls=(str(folder),), caption_key="width"), tmp_path).captions(0))
    bare = img2dataset(tmp_path / "bare", stats=False, listed=False)
    with pytest.raises(ValueError, match=r"parquet: there is no such file that may be read"):
        captions(opened(Stream(urls=(str(bare),), caption_key="alt"), tmp_path))


def test_a_count_that_is_wrong_is_found(tmp_path: Path) -> None:
    for wrong, than in ((1, "fewer"), (-1, "more")):
        folder = img2dataset(tmp_path / than, wrong=wrong)
        data = opened(Stream(urls=(str(folder),), shuffle=0), tmp_path)
        with pytest.raises(ValueError, match=rf"it holds {than} samples than {2 + wrong}, which"):
            [data.sample(i, RNG) for i in range(len(data))]


def test_a_number_for_each_shard_counts_none(ten: Path, tmp_path: Path, cache: Path) -> None:
    source = Stream(urls=(f"{ten}/00{{0,1,2,5}}.tar",), per_shard=3)
    data = opened(source, tmp_path)
    assert len(data) == 12 and not cache.exists()
    first = {0, 1, 2, 5, 6, 7, 8, 9, 10, 20, 21, 22}
    assert {int(data.sample(i, RNG).key[1:]) for i in range(12)} == first
    few = opened(Stream(urls=(str(ten),), per_shard=2), tmp_path)
    with pytest.raises(ValueError, match=r"003.tar: it holds fewer samples than 2, .*per_shard"):
        [few.sample(i, RNG) for i in range(len(few))]


def test_one_of_several_captions_is_drawn(tmp_path: Path) -> None:
    facts = json.dumps({"texts": ["a", " b ", "c"]}).encode()
    source = one(tmp_path, ("x.png", png()), ("x.json", facts), ("x.txt", b"one\ntwo\n"))
    for more, wanted in (
        ({"caption_key": "texts"}, {"a", "b", "c"}),
        ({"caption_lines": True}, {"one", "two"}),
        ({}, {"one\ntwo"}),
    ):
        data = opened(Stream(urls=source.urls, **more), tmp_path)
        assert {data.caption(0, np.random.default_rng(i)) for i in range(20)} == wanted


def latent_shard(folder: Path, encoder: str = "vae-32", **wrong: Any) -> Stream:
    members = []
    for number in range(3):
        latent = npy_bytes(np.full((8, 8, 8), number, np.float16))
        facts = facts_json(latent, encoder, (64, 48, 0, 8, 32, 32), captions=["a", f"b{number}"])
        data = wrong.get("data", latent)
        members += [(f"{number}.latent.npy", data), (f"{number}.json", facts)]
    return one(folder, *members)


def test_latents_stand_in_the_place_of_pictures(tmp_path: Path) -> None:
    data = opened(latent_shard(tmp_path), tmp_path, encoder=lambda: "vae-32")
    batch: Batch = batches(data, batch=3)[0].to(torch.device("cpu"))
    assert batch.pixels is None and batch.moments is not None
    assert batch.moments.dtype == torch.float32 and batch.moments.shape == (3, 8, 8, 8)
    assert [f"{row[0, 0, 0]:.0f}" for row in batch.moments] == batch.keys
    assert data.crop(0) == (64, 48, 0, 8, 32, 32)
    drawn = {data.caption(0, np.random.default_rng(i)) for i in range(9)}
    assert drawn == {"a", f"b{data.key(0)}"}
    with pytest.raises(ImageError, match="hold latents and no pictures"):
        data.image(0)


def test_stale_and_damaged_latents_are_found(tmp_path: Path) -> None:
    data = opened(latent_shard(tmp_path), tmp_path, encoder=lambda: "other-32")
    with pytest.raises(ValueError, match=r"made by another VAE, or at another run.resolution"):
        data.moments(0)
    changed = npy_bytes(np.full((8, 8, 8), 9, np.float16))
    data = opened(latent_shard(tmp_path, data=changed), tmp_path)
    with pytest.raises(ValueError, match="its latents have changed; copy the shard again"):
        data.moments(0)


BAD: Sequence[tuple[tuple[tuple[str, bytes], ...], str]] = (
    ((("a.png", b"x"), ("a.pkl", b"x")), "a pickle can run code when it is read"),
    ((("a.png", png()), ("a.cls", b"1")), "an unknown extension .*data.ignore"),
    ((("a.txt", b"a"),), "a: 0 images among .txt; a sample has one image"),
    ((("a.png", png()), ("a.jpg", png())), "a: 2 images among .jpg, .png"),
    ((("a.png", png()), ("a.png", png())), "a.png is in it twice; remove one"),
    ((("a.png", png()), ("b.png", png()), ("a.txt", b"")), "duplicate key 'a'"),
    ((("../a.png", png()),), "an absolute or upward name"),
    ((), "this shard has no sample; leave it out"),
)


@pytest.mark.parametrize(("members", "says"), BAD)
def test_shards_that_are_refused(
    tmp_path: Path, members: tuple[tuple[str, bytes], ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        opened(one(tmp_path, *members), tmp_path)


def test_a_shard_that_ends_early(ten: Path, tmp_path: Path) -> None:
    data = (ten / "007.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"truncated, damaged or compressed .*copy it again"):
        opened(Stream(urls=(str(tmp_path / "cut.tar"),)), tmp_path)


def test_a_picture_that_is_damaged_is_named(tmp_path: Path) -> None:
    data = opened(one(tmp_path, ("a.png", png()[:40]), ("a.txt", b"")), tmp_path)
    with pytest.raises(ImageError, match=r"one.tar: a.png: truncated or damaged"):
        data.sample(0, RNG)


def test_a_folder_on_a_disk_may_have_the_name_of_a_pattern(ten: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a [b]"
    folder.mkdir()
    (folder / "000.tar").write_bytes((ten / "000.tar").read_bytes())
    for name in (folder, folder / "000.tar"):
        assert Stream(urls=(str(name),)).epoch() == SIZES[0]


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("pipe:cat x.tar", "commands and chained addresses are not read"),
        ("simplecache::s3://b/x.tar", "commands and chained addresses are not read"),
        ("ftp://host/x.tar", "ftp:// is not read; give a local path, or s3://"),
        ("https://me:word@host/x.tar", "leave out user, password"),
        ("s3://me:word@bucket/x.tar", "leave out user, password"),
        ("hf://me:word@datasets/me/photos@main/x.tar", "leave out user, password"),
        ("https://host/x.tar?X-Amz-Signature=1", "leave out user, password"),
        ("https://host/data", "a web server does not list its files; name every shard"),
        ("https://host/*.tar", "a web server does not list its files; name every shard"),
        ("./x-{9..1}.tar", "runs backwards"),
        ("s3:bucket/x.tar", "no local path and no address; write it as in s3://"),
        ("s3://", "give the address of shards"),
    ],
)
def test_addresses_that_are_refused(urls: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Stream(urls=(urls,))


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("{0}/*.tgz", "there is no such file; check the name"),
        ("{0}/000.tar.gz", "000.tar.gz: not a .tar; give plain .tar files"),
        ("{0}/nothing", "nothing: not a .tar"),
        ("{0}/{{000,999}}.tar", "999.tar: there is no such file; copy it there"),
        ("{0}/empty", "no .tar in this folder"),
    ],
)
def test_what_is_not_there(ten: Path, tmp_path: Path, urls: str, says: str) -> None:
    (ten / "empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=says):
        opened(Stream(urls=(urls.format(ten),)), tmp_path)
    with pytest.raises(ValueError, match=r"000.tar: named twice; leave one out"):
        opened(Stream(urls=(f"{ten}/000.tar", f"{ten}/0*.tar")), tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.buckets=8"], "data.buckets: shapes of a stream's pictures are not known"),
        (["data.on_bad=skip"], "data.on_bad: a stream ends at a sample that cannot be used"),
        (["data.mixture={a: {urls: x.tar, wait: 1}}"], r"data.mixture.a.wait=1: no such key"),
        (
            ["data.urls=./a.tar", "data.mixture={a: {urls: x.tar}}"],
            "give urls, or a mixture of several",
        ),
        (["data.urls=[]"], "give urls, or a mixture"),
        (["data.mixture={a: {urls: []}}"], "mixture.a.urls is empty"),
    ],
)
def test_options_that_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(["recipe=lora_folder", "data.source=stream", *words])


def test_lines_are_idle_where_captions_are_elsewhere(ten: Path) -> None:
    words = [f"data.urls={ten}", "data.caption_key=alt", "data.caption_lines=true"]
    with pytest.raises(RecipeError, match=r"data.caption_lines=True has no effect: data.caption_k"):
        load_recipe(["recipe=lora_folder", "data.source=stream", *words])


def test_counts_are_kept_and_a_worker_takes_little_with_it(
    ten: Path, tmp_path: Path, cache: Path
) -> None:
    data = opened(Stream(urls=(str(ten),)), tmp_path)
    (kept,) = (cache / "counted").iterdir()
    assert [count for count, _ in json.loads(kept.read_text())] == list(SIZES)
    kept.write_text("[[1, [0]]]")  # another's
    assert len(opened(Stream(urls=(str(ten),)), tmp_path)) == TOTAL
    [data.sample(i, RNG) for i in range(9)]
    again = pickle.loads(pickle.dumps(data))
    assert not again.kept and not again.flows[0].order.cursors
    assert again.sample(9, RNG).key == data.sample(9, RNG).key


def test_marks_lead_to_the_same_samples(tmp_path: Path) -> None:
    members = [(f"k{i:03d}.{e}", d) for i in range(90) for e, d in (("png", png()), ("txt", b"x"))]
    source = one(tmp_path, *members)
    marked = opened(source, tmp_path)
    (marks,) = (file.marks for file in marked.flows[0].files)
    assert len(marks) == 3
    plain = opened(Stream(urls=source.urls, per_shard=90), tmp_path)
    assert not plain.flows[0].files[0].marks
    assert [marked.key(i) for i in range(90)] == [plain.key(i) for i in range(90)]
