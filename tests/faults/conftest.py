"""Runs of a second, in this process, in a forked one or in new ones, and what they leave."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `driver` is imported by name, in forked processes too

import driver
from commands import server
from server import serve

from trainer.common.exit_codes import LeaveError
from trainer.config.load import load_recipe
from trainer.data.tars.write_shards import write_world
from trainer.training import checkpoint_files as checkpoint
from trainer.training.checkpoint_files import (
    Checkpoint,
    every_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from trainer.training.fit import fit

QUICK = (
    "recipe=custom_diffusion", "run.batch_size=2", "data.prior_weight=0", "data.class_word=null",
    "data.augment=false", "methods.new_token.init=animal", "optim.ema=0.9", "run.steps=5",
    "run.checkpoint_every=1", "run.checkpoint_keep=99", "run.validate_every=0", "preview.every=0",
    "tracker=none", "optim.lr=1e-3",
)  # fmt: skip
# the same on scenes in tars, read from a server as they are trained on
STREAMED = """
data: {{source: remote, url: "{url}"}}
methods: {{selective: {{sites: cross, projections: [k, v]}}}}
"""
STATE = ("optimizer", "schedule", "parts", "rng")
Words = Callable[..., list[str]]
Run = Callable[..., int]
Whole = Callable[..., Path]


def words_of(backbone: Path, *own: str) -> list[str]:
    """The words of a run of five steps; given ones replace those of the same key, and a recipe
    brings data and methods of its own."""
    other = any(word.startswith("recipe=") for word in own)
    quick = [word for word in QUICK if not (other and word.startswith(("data.", "methods.")))]
    if "run.checkpoint_every=0" in own:  # then there is none to keep
        quick.remove("run.checkpoint_keep=99")
    every = [*quick, f"backbone={backbone}", *own]
    return list({word.split("=")[0]: word for word in every}.values())


@pytest.fixture(scope="session")
def words(tiny_folder: Path) -> Words:
    return partial(words_of, tiny_folder)


@contextmanager
def streaming(folder: Path) -> Iterator[str]:
    """The word that makes it a run on tars of a server, which serves inside the block."""
    write_world(folder / "world", 14, seed=3, per_shard=5)
    with serve(folder / "world") as url:
        (folder / "streamed.yaml").write_text(STREAMED.format(url=url))
        yield f"recipe={folder / 'streamed.yaml'}"


@pytest.fixture
def streamed(tmp_path: Path) -> Iterator[str]:
    with streaming(tmp_path) as word:
        yield word


@pytest.fixture
def run(words: Words) -> Run:
    """`run(folder, *words)`: in this process; the exit code."""

    def run(folder: Path, *own: str) -> int:
        try:
            fit(load_recipe(words(*own)), folder)
        except LeaveError as leaving:
            return leaving.code
        return 0

    return run


@pytest.fixture(scope="session")
def whole(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`whole(*words)`: the folder of a run that nothing disturbed, trained once; not to be
    changed."""

    @functools.cache
    def trained(*own: str) -> Path:
        return fit(load_recipe(words(*own)), tmp_path_factory.mktemp("whole") / "run")

    return trained


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`with fault(nan={"step": 1}):` in this process."""

    @contextmanager
    def fault(**faults: Any) -> Any:
        with monkeypatch.context() as patch:
            driver.install(faults, patch.setattr)
            yield

    return fault


@pytest.fixture
def forked(words: Words) -> Any:
    """`forked(folder, faults, *words)`: a process of its own, forked where all is imported; its
    stderr is `folder` with the suffix `.err`, after a dot and its number where it is a rank, whose
    environment is given as `rank`."""
    processes: list[Any] = []

    def start(
        folder: Path, faults: Any = None, *own: str, rank: Mapping[str, str] | None = None
    ) -> Any:
        environment = dict(rank or os.environ)
        said = folder.with_suffix(f".{rank['RANK']}.err" if rank else ".err")
        arguments = (faults or {}, [*words(*own), f"run={folder}"], said, environment)
        process = server().Process(target=driver.forked, args=arguments)
        processes.append(process)
        process.start()
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def started(words: Words) -> Any:
    """`started(folder, faults, *words)`: a new process, which starts others for more ranks."""
    processes: list[subprocess.Popen[str]] = []

    def start(folder: Path, faults: Any, *own: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "driver.py"), json.dumps(faults)]
        environment = {k: v for k, v in os.environ.items() if k != "TRAINER_RUN_ID"}
        process = subprocess.Popen(
            [*command, *words(*own), f"run={folder}"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, 9)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All of a run, the oldest first, each verified."""
    return [
        checkpoint.verified(path) for path in reversed(every_checkpoint(folder / "checkpoints"))
    ]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def same(one: Any, other: Any) -> bool:
    """Whether two trees of plain values and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def differing(one: Checkpoint, other: Checkpoint) -> list[str]:
    """What two checkpoints of one step do not share: weights, optimiser, average, draws."""
    (weights, state), (others, of_other) = read_checkpoint(one), read_checkpoint(other)
    unlike = [name for name in weights if not same(weights[name], others.get(name))]
    return unlike + [name for name in STATE if not same(state[name], of_other[name])]


def wait_for(path: Path, process: Any) -> None:
    """Until the file is there, which a process is about to make."""
    ended = process.poll if isinstance(process, subprocess.Popen) else lambda: process.exitcode
    deadline = time.monotonic() + 240
    while not path.exists():
        assert ended() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="session")
def look() -> Any:
    """The functions above, for tests that cannot import this file."""
    own = (checkpoints, events, same, differing, wait_for)
    functions = (*own, read_checkpoint, write_checkpoint)
    return SimpleNamespace(**{function.__name__: function for function in functions})
