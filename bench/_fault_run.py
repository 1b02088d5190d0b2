"""Rows of bench/faults.py: what happens to a run from outside, and inside a step."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from _common import Bars
from _fault_left import (
    HANG,
    Row,
    finite,
    lightning_weights,
    lines,
    listed,
    logged,
    of,
    pictures,
    step_names,
    whole_file,
)
from _faulty import Ended, Job, Place, in_turn, seen, small_disk
from safetensors.torch import load_file


def signals(bars: Bars, place: Place, quick: bool) -> list[Row]:
    kinds = {
        "SIGTERM": ([signal.SIGTERM], 143),
        "SIGTERM twice": ([signal.SIGTERM, signal.SIGTERM], 143),
        "SIGINT": ([signal.SIGINT], 130),
        "SIGUSR1": ([signal.SIGUSR1], 75),
    }
    rows, slowest, wrong = [], 0.0, 0
    for name, (numbers, code) in list(kinds.items())[: 1 if quick else None]:
        folder, out = place.new("signalled"), place.new("plain-signalled")
        job = place.ours(folder, {}, "run.steps=4000", "run.checkpoint_every=0", "run.log_every=1")
        job.wait_for(lambda f=folder: logged(f, 2))  # type: ignore[misc]
        ended = _signalled(job, [job.pid], numbers)
        saved = len(step_names(folder))
        slowest, wrong = max(slowest, ended.seconds), wrong + (ended.code != code or saved != 1)
        ours = f"exit code {ended.code}, saved {_times(saved)}, in {ended.seconds:.1f} s"
        job = place.plain(*_endless(place, out))
        job.wait_for(lambda o=out: len(seen(o)) > 1)  # type: ignore[misc]
        rows.append(
            Row(f"{name} to the only process", ours, _plainly(job, [job.pid], numbers, out))
        )
    inside = {
        "SIGTERM in the middle of a save": (
            {"signal_in_save": {"number": signal.SIGTERM, "save": 2}}, (), {1, 2},
            {"signal_in_save": {"numbers": [], "number": signal.SIGTERM, "step": 2}},
        ),
        "SIGTERM during validation": (
            {"signal_in_validation": {"number": signal.SIGTERM, "step": 2}},
            ("run.validate_every=2", "run.checkpoint_every=0"), {2}, None,
        ),
    }  # fmt: skip
    for name, (faults, own, steps, plain_faults) in inside.items():
        folder, out = place.new("signalled"), place.new("plain-signalled")
        ended = place.ours(folder, faults, *own).wait()
        left_there = step_names(folder)
        wrong += ended.code != 143 or left_there != steps
        ours = (
            f"exit code {ended.code}, checkpoints of steps {listed(map(str, sorted(left_there)))}"
        )
        plain = "-"
        if plain_faults is not None:
            words = ("--data", str(pictures(place)), "--out", str(out), "--steps", "60")
            left = place.plain(*words, "--faults", json.dumps(plain_faults)).wait(HANG)
            files = sorted((out / "checkpoints").glob("*.ckpt"))
            good = sum(map(whole_file, files))
            plain = f"{left.text()}; {of(good, len(files))} checkpoints read back"
        rows.append(Row(name, ours, plain))
    row, ended = _second_rank(place)
    rows.append(row)
    wrong += ended.code != 143
    bars.exactly("signals_wrong", wrong, 0)
    bars.at_most("signals_slowest_s", max(slowest, ended.seconds), 10)
    return rows


def _second_rank(place: Place) -> tuple[Row, Ended]:
    """SIGTERM to the second of two ranks."""
    folder, out = place.new("signalled"), place.new("plain-signalled")
    own = ("run.steps=4000", "run.checkpoint_every=0", "run.log_every=1")
    job = place.ours_ranks(folder, {}, 2, *own)
    job.wait_for(lambda: logged(folder, 2))
    ended = _signalled(job, [_rank(job, 1)], [signal.SIGTERM])
    saved = len(step_names(folder))
    ours = f"exit code {ended.code}, saved {_times(saved)}, in {ended.seconds:.1f} s"
    job = place.plain_ranks(2, *_endless(place, out))
    job.wait_for(lambda: (out / "seen-1.jsonl").exists())
    plain = _plainly(job, [_rank(job, 1)], [signal.SIGTERM], out)
    return Row("SIGTERM to the second of two ranks", ours, plain), ended


def _times(count: int) -> str:
    return {0: "nothing", 1: "once"}.get(count, f"{count} times")


def _endless(place: Place, out: Path) -> tuple[str, ...]:
    """A long run of the plain script that saves seldom."""
    data = ("--data", str(pictures(place)), "--out", str(out))
    return (*data, "--steps", "100000", "--every", "50000", "--keep", "1")


def _signalled(job: Job, pids: Sequence[int], numbers: Sequence[int]) -> Ended:
    for number in numbers:
        for pid in pids:
            with suppress(ProcessLookupError):  # it may be gone after the first
                os.kill(pid, number)
        time.sleep(0.02)
    return job.wait(HANG)


def _plainly(job: Job, pids: Sequence[int], numbers: Sequence[int], out: Path) -> str:
    ended = _signalled(job, pids, numbers)
    saved = len(list((out / "checkpoints").glob("*.ckpt")))
    after = f" in {ended.seconds:.1f} s" if ended.code is not None else ""
    return f"{ended.text()}, saved {f'{saved} files' if saved else 'nothing'}{after}"


def _rank(job: Job, rank: int) -> int:
    """The process id of a rank that the first one has started."""
    for child in psutil.Process(job.pid).children():
        with suppress(psutil.Error):
            if child.environ().get("LOCAL_RANK") == str(rank):
                return child.pid
    raise SystemExit(
        f"no rank {rank} among the children of {job.pid}\n{job.log.read_text()[-2000:]}"
    )


def nonfinite(bars: Bars, place: Place, quick: bool) -> list[Row]:
    rows, bad = [], 0
    for kind, name in (("nan", "a batch gives NaN"), ("inf", "a gradient is infinite")):
        texts = []
        for policy, code in (("raise", 70), ("skip", 0)):
            folder = place.new("nonfinite")
            ended = place.ours(folder, {kind: {"step": 2}}, f"run.on_nonfinite={policy}").wait()
            named, share = _named(place, folder), _finite(place, folder)
            bad += ended.code != code or share < 1 or not named
            texts.append(
                f"{policy}: exit code {ended.code}, {100 * share:.0f} % of weights finite, "
                f"{_telling(named)}"
            )
        fault = json.dumps({kind: {"step": 2}})
        words = ("--data", str(pictures(place)), "--steps", "8", "--faults", fault)
        out, loop = place.new("plain-nonfinite"), place.new("loop-nonfinite")
        plain = place.plain(*words, "--out", str(out)).wait()
        weights = lightning_weights(out / "checkpoints" / "last.ckpt")
        other = place.loop(*words, "--out", str(loop)).wait()
        loop_weights = load_file(loop / "checkpoint-8" / "model.safetensors")
        rows.append(
            Row(
                f"{name} in the third step",
                "; ".join(texts),
                f"{plain.text()}, {100 * finite(weights):.0f} % of weights finite at the end",
                f"{other.text()}, {100 * finite(loop_weights):.0f} % of weights finite at the end",
            )
        )
    if not quick:
        folder, out = place.new("nonfinite"), place.new("plain-nonfinite")
        faults = {"nan": {"step": 1, "rank": 1}}
        ended = place.ours_ranks(folder, faults, 2, "run.on_nonfinite=skip").wait()
        named, share = _named(place, folder), _finite(place, folder)
        bad += ended.code != 0 or share < 1 or not named
        words = ("--data", str(pictures(place)), "--steps", "5", "--batch", "2")
        fault = ("--faults", json.dumps(faults))
        plain = place.plain_ranks(2, *words, *fault, "--out", str(out)).wait()
        weights = lightning_weights(out / "checkpoints" / "last.ckpt")
        rows.append(
            Row(
                "NaN on the second of two ranks",
                f"skip: exit code {ended.code}, {100 * share:.0f} % of weights finite, "
                f"{_telling(named)}",
                f"{plain.text()}, {100 * finite(weights):.0f} % of weights finite at the end",
            )
        )
    bars.exactly("nonfinite_wrong", bad, 0)
    return rows


def _named(place: Place, folder: Path) -> int:
    found = place.faults.events(folder, "nonfinite")
    return len({key for event in found for batch in event["batches"] for key in batch["keys"]})


def _telling(named: int) -> str:
    return "its samples named" if named else "no sample named"


def _finite(place: Place, folder: Path) -> float:
    """The smallest share of finite values in any checkpoint, and in the adapter if there is one."""
    from trainer.training.checkpoint_files import read_checkpoint

    every = [read_checkpoint(each)[0] for each in place.faults.checkpoints(folder)]
    adapter = folder / "adapter.safetensors"
    return min(map(finite, [*every, *([load_file(adapter)] if adapter.exists() else [])]))


def workers(bars: Bars, place: Place, quick: bool) -> list[Row]:
    rows, slowest, wrong = [], 0.0, 0
    patience = 30 if quick else 10  # seconds; a worker's start must fit, on a busy machine, too
    for number, name, code in ((signal.SIGKILL, "killed", 1), (signal.SIGSTOP, "hangs", 124)):
        folder, out = place.new("worker"), place.new("plain-worker")
        own = (
            "run.steps=4000",
            "run.workers=1",
            f"run.timeouts.data={patience}",
            "run.log_every=1",
        )
        job = place.ours(folder, {}, *own, "run.checkpoint_keep=2")
        job.wait_for(lambda f=folder: logged(f, 2))  # type: ignore[misc]
        ended = _signalled(job, [_worker(job)], [number])
        slowest, wrong = max(slowest, ended.seconds), wrong + (ended.code != code)
        job = place.plain(*_endless(place, out), "--workers", "1")
        job.wait_for(lambda o=out: len(seen(o)) > 1)  # type: ignore[misc]
        left = _signalled(job, [_worker(job)], [number])
        rows.append(
            Row(
                f"a data worker {name}",
                f"{ended.text()} in {ended.seconds:.1f} s",
                f"{left.text()}" + (f" in {left.seconds:.1f} s" if left.code is not None else ""),
            )
        )
    folder, out = place.new("one-rank"), place.new("plain-one-rank")
    faults = {"fail": {"step": 2, "rank": 1}}
    ours = _failed(place.ours_ranks(folder, faults, 2))
    words = ("--data", str(pictures(place)), "--out", str(out), "--faults", json.dumps(faults))
    plain = _failed(place.plain_ranks(2, *words))
    wrong += ours.code in (0, None)
    bars.exactly("workers_wrong", wrong, 0)
    bars.at_most("workers_slowest_s", max(slowest, ours.seconds), 15)
    told = [
        each.text() + (f" in {each.seconds:.1f} s" if each.code is not None else "")
        for each in (ours, plain)
    ]
    return [*rows, Row("an exception on the second of two ranks", *told)]


def _failed(job: Job) -> Ended:
    """A run that ends with an exception of one rank; seconds: since it was raised."""
    ended = job.wait(HANG + 60)
    now = time.monotonic()  # of one clock for all processes
    (began,) = re.findall(r"a fault of this rank alone, at ([\d.]+)", ended.said)[:1]
    return Ended(ended.code, now - float(began), ended.said)


def _worker(job: Job) -> int:
    """A data worker: a child that is not the resource tracker which may stand beside it."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(job.pid).children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                return child.pid
    raise SystemExit(f"no worker among the children of {job.pid}\n{job.log.read_text()[-2000:]}")


def trackers(bars: Bars, place: Place, quick: bool) -> list[Row]:
    away = {
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "5",
        "WANDB_SILENT": "true",
    }
    own = ("run.log_every=1", "run.checkpoint_every=0")

    def ours(run: Path, kind: str, environment: Mapping[str, str]) -> tuple[bool, str]:
        ended = place.ours(run, {}, f"tracker={kind}", *own, environment=environment).wait()
        count = sum("train/loss" in line for line in lines(run / "metrics.jsonl"))
        done = (run / "adapter.safetensors").exists()
        good = ended.code == 0 and count == 5 and done and "the run goes on" in ended.said
        return good, f"{ended.text()}, {of(count, 5)} steps in metrics.jsonl"

    def plain(out: Path, kind: str, environment: Mapping[str, str]) -> str:
        words = ("--data", str(pictures(place)), "--out", str(out), "--steps", "5")
        ended = place.plain(*words, "--tracker", kind, environment=environment).wait()
        done = max(seen(out), default=0)
        return f"{ended.text()} after {of(done, 5)} steps"

    found: dict[str, tuple[tuple[bool, str], str]] = {}
    run, out = place.new("wandb"), place.new("plain-wandb")
    both = in_turn([lambda: ours(run, "wandb", away), lambda: plain(out, "wandb", away)])
    found["wandb's server refuses the connection"] = (both[0], both[1])
    run, out = place.new("tensorboard"), place.new("plain-tensorboard")
    for folder in (run, out):
        (folder / "tensorboard").write_text("a file in the place of the folder")
    one, other = ours(run, "tensorboard", {}), plain(out, "tensorboard", {})
    found["TensorBoard's folder cannot be made"] = (one, other)
    run, out = place.new("full-board"), place.new("plain-full-board")
    for folder in (run, out):
        (folder / "tensorboard").mkdir()
    with small_disk(run / "tensorboard", "4k") as mounted:
        if mounted:
            (run / "tensorboard" / "ballast").write_bytes(bytes(4096))
            one = ours(run, "tensorboard", {})
            with small_disk(out / "tensorboard", "4k"):
                (out / "tensorboard" / "ballast").write_bytes(bytes(4096))
                other = plain(out, "tensorboard", {})
            found["TensorBoard's disk is full"] = (one, other)
    bars.exactly("trackers_gone_on", sum(good for (good, _), _ in found.values()), len(found))
    return [Row(fault, text, other) for fault, ((_, text), other) in found.items()]
