"""The source `stream` from a real object server: the same samples by every address, and each fault
is passed over or is one sentence with the name of the shard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from object_server import BUCKET, Door, object_server, put

from trainer.data.source import Needs, NoAnswerError
from trainer.data.sources.stream import Stream
from trainer.data.streams import server_file
from trainer.data.tars.write_shards import write_world

RNG = np.random.default_rng(0)
SHARDS = ("world-000000.tar", "world-000001.tar", "world-000002.tar")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "world"
    write_world(folder, 8, seed=3, per_shard=3)
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture(scope="module")
def door(world: Path) -> Iterator[Door]:
    with object_server() as found:
        for name in SHARDS:
            put(found, f"world/{name}", (world / name).read_bytes())
        yield found


@pytest.fixture(autouse=True)
def quick(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, an empty cache, and what s3fs reads of its user."""
    import fsspec

    monkeypatch.setattr(server_file, "WAIT", 0.01)
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", door.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for system in (fsspec.get_filesystem_class("s3"), fsspec.get_filesystem_class("http")):
        system.clear_instance_cache()
    door.faults.clear()
    door.asked.clear()


def web(door: Door) -> str:
    return f"{door.address}/{BUCKET}/world/world-{{000000..000002}}.tar"


def keys(source: Stream, tmp_path: Path) -> list[str]:
    needs = Needs(32, 4, lambda *_: (), tmp_path, lambda: "", batch=2, seed=1)
    data, _ = source.open(needs)
    return [data.sample(i, RNG).key for i in range(len(data))]


def test_every_address_gives_the_same(door: Door, world: Path, tmp_path: Path) -> None:
    local = keys(Stream(urls=(str(world),)), tmp_path)
    assert sorted(local) == [f"scene-3-{i}" for i in range(8)] and local != sorted(local)
    folder = f"s3://{BUCKET}/world"
    for urls in (
        web(door),
        folder,
        f"{folder}/world-*.tar",
        f"{folder}/world-{{000000..000002}}.tar",
    ):
        assert keys(Stream(urls=(urls,)), tmp_path) == local, urls


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("fault", ["503", "cut", "slow"])
def test_a_fault_that_passes(
    door: Door, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scheme: str, fault: str, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(server_file, "TIMEOUT", 0.5)
    urls = f"s3://{BUCKET}/world" if scheme == "s3" else web(door)
    whole = keys(Stream(urls=(str(world),)), tmp_path)
    source = Stream(urls=(urls,))
    needs = Needs(32, 4, lambda *_: (), tmp_path, lambda: "", batch=2, seed=1)
    data, _ = source.open(needs)
    door.faults[SHARDS[1]] = [fault, fault]
    assert [data.sample(i, RNG).key for i in range(len(data))] == whole
    assert not door.faults[SHARDS[1]], "no request met it"
    if fault == "slow":
        time.sleep(door.slow)  # the late answers meet readers that are gone
    assert "Traceback" not in capfd.readouterr().err


def test_a_server_that_stays_busy_is_one_sentence(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Stream(urls=(web(door),), per_shard=2)
    data, _ = source.open(Needs(32, 4, lambda *_: (), tmp_path, lambda: "", batch=2))
    door.faults[SHARDS[0]] = ["always 503"]
    with pytest.raises(NoAnswerError, match=rf"{SHARDS[0]}: 503.*; tried 4 times; check the add"):
        [data.sample(i, RNG) for i in range(len(data))]
    assert door.gets(SHARDS[0]) == 4


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_missing_shard_is_named_at_the_start(door: Door, tmp_path: Path, scheme: str) -> None:
    begin = f"s3://{BUCKET}" if scheme == "s3" else f"{door.address}/{BUCKET}"
    source = Stream(urls=(f"{begin}/world/world-{{000001..000003}}.tar",))
    with pytest.raises(ValueError, match=r"world-000003.tar: there is no such file; copy it there"):
        keys(source, tmp_path)


def test_a_refusal_is_final_and_says_why(door: Door, tmp_path: Path) -> None:
    source = Stream(urls=(web(door),), per_shard=2)
    data, _ = source.open(Needs(32, 4, lambda *_: (), tmp_path, lambda: "", batch=2))
    door.faults[SHARDS[0]] = ["403"]
    with pytest.raises(ValueError, match=rf"{SHARDS[0]}: 403.*that you may read it"):
        [data.sample(i, RNG) for i in range(len(data))]
    assert door.gets(SHARDS[0]) == 1


def test_counts_are_kept_until_a_shard_changes(door: Door, world: Path, tmp_path: Path) -> None:
    assert Stream(urls=(web(door),)).epoch() == 8
    asked = len(door.asked)
    assert Stream(urls=(web(door),)).epoch() == 8 and len(door.asked) == asked
    put(door, f"world/{SHARDS[2]}", (world / SHARDS[1]).read_bytes())
    try:
        assert Stream(urls=(web(door),)).epoch() == 9
    finally:
        put(door, f"world/{SHARDS[2]}", (world / SHARDS[2]).read_bytes())


def test_nothing_there_by_a_wildcard(door: Door) -> None:
    with pytest.raises(ValueError, match=r"nothing-\*.tar: there is no such file; check the name"):
        Stream(urls=(f"s3://{BUCKET}/nothing-*.tar",)).epoch()
