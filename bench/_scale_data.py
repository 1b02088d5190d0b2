"""The parts of bench/scale.py that are of data: a stream that is killed and resumed, the loader
beside bare loops, caches, and the plan of very large data."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from _common import Bars, command
from _stream_rank import planned
from PIL import Image

from trainer.data.plan import StepPlan
from trainer.data.streams.lanes import Lanes
from trainer.data.streams.latent_member import npy_bytes
from trainer.data.streams.raw_sample import facts_json
from trainer.data.tars.manifest import LATENT, METADATA
from trainer.data.tars.write_shards import write_unlisted

BATCH, RANKS, WORKERS = 8, 2, 2
SIZES = (31, 12, 40, 25, 8, 33, 19, 27, 36, 9)  # samples of ten shards
SHARDS = 16  # of what the loader reads
TURNS = 7  # of two loops that are compared


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder, with the cache of what is measured in it."""
    before = os.environ.get("TRAINER_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRAINER_CACHE"] = f"{folder}/cache"
        yield Path(folder)
    os.environ.pop("TRAINER_CACHE")
    if before is not None:
        os.environ["TRAINER_CACHE"] = before


def stream_order(bars: Bars) -> None:
    """Two nodes of two data workers each on ten shards of different sizes, killed in the first
    epoch and in the second and resumed, beside one process that is never stopped."""
    with scratch() as folder:
        shards = _small_shards(folder / "shards")
        steps = 3 * sum(SIZES) // BATCH
        whole = planned(shards, BATCH, 0, ranks=1)
        unbroken = [key for step in range(steps) for key in whole[step].keys]
        stops = [0, steps // 5, steps // 2, steps]
        found: dict[int, list[str]] = {}
        for start, stop in pairwise(stops):
            found |= _killed(shards, start, stop)
        resumed = [key for step in range(steps) for key in found[step]]
    total = sum(SIZES)
    twice = sum(total - len(set(resumed[e * total : (e + 1) * total])) for e in range(2))
    bars.exactly("stream_samples_twice_or_never_in_two_epochs", twice, 0)
    bars.exactly("stream_other_samples_than_unbroken", _differing(unbroken, resumed), 0)


def _small_shards(folder: Path) -> str:
    folder.mkdir()
    number = 0
    for shard, size in enumerate(SIZES):
        records = []
        for _ in range(size):
            records.append((f"s{number:04d}", {"png": _png(number), "txt": b"a sprite"}))
            number += 1
        own = write_unlisted(folder / "one", records, per_shard=size, stem="x")[0]
        own.rename(folder / f"{shard:05d}.tar")
        own.parent.rmdir()
    return f"{folder}/{{00000..{len(SIZES) - 1:05d}}}.tar"


def _killed(shards: str, start: int, stop: int) -> dict[int, list[str]]:
    """The keys of steps `start` to `stop - 1`: both ranks are killed when they are through them,
    with batches of later steps read ahead; at the last step of all they end by themselves."""
    script = str(Path(__file__).with_name("_stream_rank.py"))
    ranks = []
    for rank in range(RANKS):
        numbers = map(str, (BATCH, rank, RANKS, WORKERS, start, stop + 4 * WORKERS))
        line = [sys.executable, script, shards, *numbers]
        ranks.append(
            subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
    found: dict[int, list[str]] = {}
    for process in ranks:
        assert process.stdout is not None
        for line_out in process.stdout:
            step, *keys = line_out.split()
            if int(step) == stop:
                break
            found.setdefault(int(step), []).extend(keys)
        os.killpg(process.pid, signal.SIGKILL)  # the data workers, too
        process.wait()
    return found


def _differing(one: Sequence[object], other: Sequence[object]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def loader_latents(bars: Bars) -> None:
    """Latents of 512 x 512 pixels from a stream, decoded into batches, beside a loop over the
    members of the same tars that loads each array and makes the same batches of them."""
    count = 256 if bars.quick else 2048
    with scratch() as folder:
        rng = np.random.default_rng(0)
        records = []
        for number in range(count):
            latent = npy_bytes(rng.standard_normal((8, 64, 64)).astype(np.float16))
            crop = (512, 512, 0, 0, 512, 512)
            facts = facts_json(latent, "x", crop, captions=["a photo of a sprite"])
            records.append((f"{number:06d}", {LATENT: latent, METADATA: facts}))
        paths = write_unlisted(folder / "shards", records, per_shard=count // SHARDS, stem="x")
        items = planned(str(folder / "shards"), 32, 0, ranks=1, side=512)
        steps = count // 32

        def bare() -> None:
            found = []
            for name, data in _members(paths):
                if name.endswith(".npy"):
                    found.append(torch.from_numpy(np.load(io.BytesIO(data))))
                if len(found) == 32:
                    torch.stack(found)
                    found = []

        done = iter(range(10**9))

        def ours() -> None:
            for _ in range(steps):
                items[next(done)]

        _compared(bars, "loader_latents_of_a_bare_loop", bare, ours, count=count, bar=0.9)


def loader_jpeg(bars: Bars) -> None:
    """JPEGs of 512 x 512 pixels from a stream as batches of tensors, by one process, beside PIL
    decoding the same members of the same tars to arrays."""
    count = 128 if bars.quick else 512
    with scratch() as folder:
        pictures = [_jpeg(number) for number in range(count)]
        records = [
            (f"{number:06d}", {"jpg": data, "txt": b"a photo"})
            for number, data in enumerate(pictures)
        ]
        paths = write_unlisted(folder / "shards", records, per_shard=count // SHARDS, stem="x")
        items = planned(str(folder / "shards"), 16, 0, ranks=1, side=512)
        steps, done = count // 16, iter(range(10**9))

        def bare() -> None:
            for name, data in _members(paths):
                if name.endswith(".jpg"):
                    np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

        def ours() -> None:
            for _ in range(steps):
                items[next(done)]

        _compared(bars, "loader_jpeg_of_bare_decoding", bare, ours, count=count, bar=0.95)


def _members(paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Every member of tars, as a plain loop reads them."""
    for path in paths:
        with tarfile.open(path) as archive:
            for info in archive:
                file = archive.extractfile(info)
                assert file is not None
                yield info.name, file.read()


def _compared(
    bars: Bars, name: str, bare: Callable[[], None], ours: Callable[[], None], *,
    count: int, bar: float,
) -> None:  # fmt: skip
    """Both in turns, by the processor time of this one thread, which other work on the machine does
    not change; the middle of their quotients against the bar."""
    seconds: list[tuple[float, float]] = []
    ours()  # opens the shards
    for _ in range(2 if bars.quick else TURNS):
        each = []
        for loop in (bare, ours):
            begin = time.process_time()
            loop()
            each.append(time.process_time() - begin)
        seconds.append((each[0], each[1]))
    bars.note(f"{name}_bare_per_s", count / statistics.median(one for one, _ in seconds))
    bars.note(f"{name}_ours_per_s", count / statistics.median(other for _, other in seconds))
    bars.at_least(name, statistics.median(one / other for one, other in seconds), bar)


def caching(bars: Bars) -> None:
    """The tiny backbone on a stream, after an epoch in which latents and texts are kept, with them
    and without: images a second, and the losses."""
    steps = 12 if bars.quick else 80
    with scratch() as folder:
        command("data", "world", "out=world", "count=96", "seed=3", folder=folder, cache=folder)
        words = (
            "recipe=lora_folder", "data.source=stream", "data.urls=world", "run.validate_every=0",
            "preview.every=0", f"run.steps={steps}", "run.log_every=1", "tracker=none",
        )  # fmt: skip
        without = ("run.cache_latents=false", "run.cache_text=false")
        command("fit", *words, "run.id=first", folder=folder, cache=folder, threads=1)
        rates, losses = {}, {}
        for name, more in {"kept": (), "plain": without}.items():
            command("fit", *words, *more, f"run.id={name}", folder=folder, cache=folder, threads=1)
            place = next((folder / "runs").glob(f"*/{name}"))
            rates[name], losses[name] = _metrics(place)
    bars.note("caching_images_per_s", rates)
    bars.at_least("caching_faster", rates["kept"] / rates["plain"], 1.3)
    bars.exactly("caching_other_losses", _differing(losses["kept"], losses["plain"]), 0)


def plan(bars: Bars) -> None:
    """The plan of 1,024 ranks, 100 million samples and 10,000 shards, indexed and streamed: the
    longest of many steps at random, with its first use of an epoch; and what it holds."""
    ranks, samples, shards, rows = 1024, 100_000_000, 10_000, 8192
    rng, slowest = random.Random(0), {"indexed": 0.0, "streamed": 0.0}
    some = [
        (rng.randrange(3 * samples // rows), rng.randrange(ranks))
        for _ in range(200 if bars.quick else 2000)
    ]
    tracemalloc.start()
    indexed = StepPlan(((0, samples),), (1.0,), (1.0,), rows, seed=1)
    lanes = Lanes((samples // shards,) * shards, rows, ranks, workers=4, seed=1)
    for step, rank in some[:50]:
        _step(indexed, lanes, step, rank=rank)
    bars.at_most("plan_mb", tracemalloc.get_traced_memory()[1] / 1e6, 100)
    tracemalloc.stop()
    for step, rank in some:
        for name, seconds in _step(indexed, lanes, step, rank=rank).items():
            slowest[name] = max(slowest[name], seconds)
    for name, seconds in slowest.items():
        bars.at_most(f"plan_{name}_slowest_step_ms", 1000 * seconds, 1)
    bars.exactly("plan_samples_twice_in_an_epoch", _twice(indexed, lanes, quick=bars.quick), 0)


def _step(indexed: StepPlan, lanes: Lanes, step: int, *, rank: int) -> dict[str, float]:
    """Seconds of processor time that each plan takes for a rank's part of a step."""
    own = indexed.batch_size // lanes.ranks
    begin = time.process_time()
    slots = indexed.local(step, rank, lanes.ranks)
    middle = time.process_time()
    first = step * indexed.batch_size + own * rank
    found = [_streamed(lanes, position) for position in range(first, first + own)]
    end = time.process_time()
    assert len(slots) == len(found) == own, "every rank gets as many"
    return {"indexed": middle - begin, "streamed": end - middle}


def _streamed(lanes: Lanes, position: int) -> tuple[int, int]:
    """The shard of a position, and which of its samples it is, before the buffer."""
    lane, taken = lanes.place(position)
    epoch = position // lanes.total
    first, _ = lanes.run(lane, epoch)
    place = first + taken - lanes.before(lane, epoch * lanes.total)
    piece = next(lanes.pieces(epoch, place, place + 1))
    return piece.shard, piece.first


def _twice(indexed: StepPlan, lanes: Lanes, *, quick: bool) -> int:
    """How many samples come twice among many of the second epoch, of both plans."""
    total = lanes.total
    some = range(total, total + (20_000 if quick else 400_000))
    one = {indexed._index(0, position) for position in some}
    other = {_streamed(lanes, position) for position in some}
    return 2 * len(some) - len(one) - len(other)


def _metrics(place: Path) -> tuple[float, list[float]]:
    """Images a second in the second half of a run, and every loss as it was written."""
    lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    rates = [row["train/images_per_second"] for row in rows[len(rows) // 2 :]]
    return statistics.median(rates), [row["train/loss"] for row in rows]


def _png(number: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(held, "PNG")
    return held.getvalue()


def _jpeg(number: int) -> bytes:
    """A photograph of 512 x 512 pixels, turned by `number`."""
    from skimage import data

    photo = Image.fromarray(data.astronaut()).rotate(number * 90, Image.Resampling.BICUBIC)
    held = io.BytesIO()
    photo.save(held, "JPEG", quality=95)
    return held.getvalue()


PARTS: dict[str, Callable[[Bars], None]] = {
    "stream_order": stream_order,
    "loader_latents": loader_latents,
    "loader_jpeg": loader_jpeg,
    "caching": caching,
    "plan": plan,
}
