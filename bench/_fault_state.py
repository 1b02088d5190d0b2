"""Rows of bench/faults.py: what a run keeps of itself, and whether it goes on from there."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _common import Bars
from _fault_left import (
    SHM,
    Row,
    expect,
    lightning_weights,
    listed,
    of,
    pictures,
    sound,
    step_names,
    unlike,
    whole_file,
    world,
)
from _faulty import TESTS, Place, equal, in_turn, load, seen, small_disk
from safetensors.torch import load_file


def resume(bars: Bars, place: Place, quick: bool) -> list[Row]:
    steps = 5 if quick else 24
    with place.faults.streaming(place.new("streaming")) as streamed:
        ours = {
            "pictures": ours_resumed(place, steps, ()),
            "tars": ours_resumed(place, steps, (streamed,)),
        }
    points = [each for kinds in ours.values() for own in kinds.values() for each in own]
    bars.exactly("resume_points_equal", sum(points), len(points))
    few = range(1, steps) if quick else range(2, steps, 4)
    plain = {
        "pictures": plain_resumed(place, steps, range(1, steps), "--data", str(pictures(place))),
        "pictures, 2 workers": plain_resumed(
            place, steps, few, "--data", str(pictures(place)), "--workers", "2"
        ),
        "tars": plain_resumed(place, steps, few, "--tars", "--data", str(world(place))),
    }
    loop = loop_resumed(place, steps)
    bars.note("resume", {"ours": ours, "lightning": plain, "accelerate": loop})

    def told(points: Sequence[tuple[bool, bool]]) -> str:
        same, order = sum(a for a, _ in points), sum(b for _, b in points)
        return (
            f"{of(same, len(points))} points with equal weights; the rest of the run is trained on "
            f"the same batches at {order}"
        )

    def tell(name: str, kind: str) -> str:
        own = ours[name][kind]
        what = "weights, optimiser, average and generators equal to the last bit"
        return f"{of(sum(own), len(own))} points: {what}"

    after = f"stopped after each of {steps - 1} steps"
    chain = "stopped after every step of one run, with no, 1 and 2 data workers by turns"
    return [
        Row(f"{after}, pictures", tell("pictures", "alone"), told(plain["pictures"]), told(loop)),
        Row(
            f"{chain} (plain: stopped once, 2 workers)",
            tell("pictures", "chain"),
            told(plain["pictures, 2 workers"]),
        ),
        Row(f"{after}, streamed tars", tell("tars", "alone"), told(plain["tars"])),
        Row(f"{chain}, streamed tars", tell("tars", "chain"), "-"),
    ]


def ours_resumed(place: Place, steps: int, own: Sequence[str]) -> dict[str, list[bool]]:
    """Each point alone; and one run that is stopped after every step, with no, one and two workers
    by turns."""
    words = (f"run.steps={steps}", *(own or ("run.validate_every=5",)))  # tars hold none out
    whole = place.new("whole")
    expect(place.ours(whole, {}, *words).wait(), 0)

    def alone(step: int) -> bool:
        folder = place.new("alone")
        for kept in range(1, step + 1):
            name = f"checkpoints/step-{kept:06d}"
            shutil.copytree(whole / name, folder / name)
        expect(place.ours(folder, {}, *words).wait(), 0)
        return not any(unlike(place, whole, folder).values())

    def chain() -> list[bool]:
        folder = place.new("chain")
        for step in range(steps):
            faults = {"signals": {"numbers": [signal.SIGTERM], "step": step}}
            last = step == steps - 1
            job = place.ours(folder, {} if last else faults, *words, f"run.workers={step % 3}")
            expect(job.wait(), 0 if last else 143)
        return [not names for step, names in unlike(place, whole, folder).items() if step > 1]

    calls: list[Callable[[], Any]] = [chain, *(lambda k=k: alone(k) for k in range(1, steps))]
    chained, *others = in_turn(calls)
    return {"alone": others, "chain": chained}


def plain_resumed(
    place: Place, steps: int, points: Sequence[int], *words: str
) -> list[tuple[bool, bool]]:
    """For each point: whether the weights at the end are the unbroken run's, and whether the
    batches after it were."""
    words = (*words, "--steps", str(steps), "--keep=1")
    whole = place.new("plain-whole")
    expect(place.plain(*words, "--out", str(whole)).wait(), 0)
    weights, order = lightning_weights(whole / "checkpoints" / "last.ckpt"), seen(whole)

    def point(step: int) -> tuple[bool, bool]:
        out = place.new("plain")
        fault = json.dumps({"fail": {"step": step}})
        expect(place.plain(*words, "--out", str(out), "--faults", fault).wait(), 1)
        if place.plain(*words, "--out", str(out), "--resume").wait().code:
            return False, False
        own = lightning_weights(out / "checkpoints" / "last.ckpt")
        return equal(own, weights), seen(out) == order

    return in_turn([lambda k=k: point(k) for k in points])  # type: ignore[misc]


def loop_resumed(place: Place, steps: int) -> list[tuple[bool, bool]]:
    words = ("--data", str(pictures(place)), "--steps", str(steps))
    whole = place.new("loop-whole")
    expect(place.loop(*words, "--out", str(whole)).wait(), 0)
    last = f"checkpoint-{steps}/model.safetensors"
    weights, order = load_file(whole / last), seen(whole)

    def point(step: int) -> tuple[bool, bool]:
        out = place.new("loop")
        expect(place.loop(*words, "--out", str(out), "--stop", str(step)).wait(), 0)
        expect(place.loop(*words, "--out", str(out), "--resume").wait(), 0)
        return equal(load_file(out / last), weights), seen(out) == order

    return in_turn([lambda k=k: point(k) for k in range(1, steps)])  # type: ignore[misc]


def kill(bars: Bars, place: Place, quick: bool) -> list[Row]:
    kills, trials = (4, 2) if quick else (50, 12)
    ours, plain = in_turn([lambda: ours_killed(place, kills), lambda: plain_killed(place, trials)])
    bars.exactly("kills_resumed", ours["resumed"], kills)
    bars.exactly("kills_weights_equal", ours["equal"], 1)
    bars.exactly("kills_fallbacks", ours["fallbacks"], 0)
    bars.note("kill", {"ours": ours, "lightning": plain})
    same = "equal" if ours["equal"] else "not equal"
    return [
        Row(
            "kill -9 at random moments and in the middle of saves, temporary files on another "
            "file system",
            f"{of(ours['resumed'], kills)} resumed; weights at the end {same} to the unbroken "
            f"run's; {ours['fallbacks']} half-written checkpoints met",
            f"{of(plain['resumed'], trials)} resumed, {plain['equal']} with equal weights at the "
            f"end; after {plain['cut']} a cut file lay under a checkpoint's name",
        )
    ]


def elsewhere() -> dict[str, str]:
    return {"TMPDIR": str(SHM)} if SHM.is_dir() else {}


def ours_killed(place: Place, kills: int) -> dict[str, int]:
    """One run, killed so often; every second time at the first sign of a save."""
    own = (f"run.steps={6 * kills + 10}", "run.checkpoint_keep=3")
    folder, moments, resumed = place.new("killed"), random.Random(0), 0
    for number in range(kills):
        before = max(step_names(folder), default=0)
        job = place.ours(folder, {}, *own, environment=elsewhere())
        resumed += job.wait_for(lambda b=before: max(step_names(folder), default=0) > b)  # type: ignore[misc]
        if number % 2:
            time.sleep(moments.uniform(0, 0.1))
        else:
            job.wait_for(lambda: any(folder.glob("checkpoints/.step-*")))
        expect(job.kill(), -signal.SIGKILL)
    expect(place.ours(folder, {}, *own).wait(), 0)
    whole = place.new("whole")
    expect(place.ours(whole, {}, *own).wait(), 0)
    last = [place.faults.checkpoints(each)[-1] for each in (whole, folder)]
    return {
        "kills": kills,
        "resumed": resumed,
        "equal": int(not place.faults.differing(*last)),
        "fallbacks": len(place.faults.events(folder, "fallback")),
    }


def plain_killed(place: Place, trials: int) -> dict[str, int]:
    """A run each, killed once: half of them at a random moment, half when the file of a save is
    first seen. Lightning keeps the whole module, so its frozen part of 64 MB is written, too."""
    words = ("--data", str(pictures(place)), "--steps", "16", "--ballast", "64", "--keep", "1")
    whole = place.new("plain-whole")
    expect(place.plain(*words, "--out", str(whole)).wait(), 0)
    weights, moments = lightning_weights(whole / "checkpoints" / "last.ckpt"), random.Random(0)
    found = Counter[str]()
    for number in range(trials):
        out = place.new("plain-killed")
        job = place.plain(*words, "--out", str(out), environment=elsewhere())
        checkpoints = out / "checkpoints"
        job.wait_for(lambda c=checkpoints: (c / "last.ckpt").exists())  # type: ignore[misc]
        if number % 2:
            time.sleep(moments.uniform(0, 0.5))
        else:
            names = set(checkpoints.iterdir())
            job.wait_for(lambda c=checkpoints, n=names: set(c.iterdir()) - n)  # type: ignore[misc]
        expect(job.kill(), -signal.SIGKILL)
        found["cut"] += not all(map(whole_file, checkpoints.glob("*.ckpt")))
        ended = place.plain(*words, "--out", str(out), "--resume").wait()
        found["resumed"] += ended.code == 0
        found["equal"] += ended.code == 0 and equal(
            lightning_weights(checkpoints / "last.ckpt"), weights
        )
        shutil.rmtree(out)
    return {"trials": trials, **{name: found[name] for name in ("resumed", "equal", "cut")}}


def ranks(bars: Bars, place: Place, quick: bool) -> list[Row]:
    """Saved by two ranks after the third of seven steps, gone on with by one and by four."""
    others = (1,) if quick else (1, 4)
    ours, plain = in_turn([lambda: ours_ranks(place, others), lambda: plain_ranks(place, others)])
    bars.exactly("ranks_unlike", sum(each["unlike"] for each in ours.values()), 0)
    bars.at_most("ranks_loss_apart", max(each["loss_apart"] for each in ours.values()), 1e-5)
    bars.note("ranks", {"ours": ours, "lightning": plain})
    return [
        Row(
            f"saved by 2 ranks, gone on with by {count}",
            f"{mine['unlike']} of {mine['samples']} samples with another place, noise or timestep; "
            f"losses within {mine['loss_apart']:.0e}",
            f"{of(plain[count], 4)} batches after it hold the pictures of the unbroken run",
        )
        for count, mine in ours.items()
    ]


def traced(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """By micro-batch and place in it; the later of two times counts."""
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("seen-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {(row.pop("step"), row.pop("place")): row for row in rows}


def ours_ranks(place: Place, others: Sequence[int]) -> dict[int, dict[str, Any]]:
    own = ("run.steps=7", "run.batch_size=4", "run.validate_every=0")
    whole, first = place.new("whole"), place.new("two")
    expect(place.ours(whole, {"trace": {"folder": str(whole)}}, *own).wait(), 0)
    stop = {"signals": {"numbers": [signal.SIGTERM], "step": 2, "rank": 1}}
    expect(place.ours_ranks(first, {"trace": {"folder": str(first)}, **stop}, 2, *own).wait(), 143)
    wanted, found = traced(whole), {}
    for count in others:
        folder = place.new("gone-on")
        shutil.copytree(first, folder, dirs_exist_ok=True)
        trace = {"trace": {"folder": str(folder)}}
        workers = f"run.workers={3 if count == 1 else 0}"
        job = (
            place.ours(folder, trace, workers, *own)
            if count == 1
            else place.ours_ranks(folder, trace, count, workers, *own)
        )
        expect(job.wait(), 0)
        got = traced(folder)
        apart = [abs(got[key]["loss"] - row["loss"]) for key, row in wanted.items() if key in got]
        same = [
            key in got and all(got[key][name] == row[name] for name in ("key", "timestep", "noise"))
            for key, row in wanted.items()
        ]
        strange = len(got.keys() - wanted.keys())
        found[count] = {
            "samples": len(wanted),
            "unlike": same.count(False) + strange,
            "loss_apart": max(apart),
        }
    return found


def plain_ranks(place: Place, others: Sequence[int]) -> dict[int, int]:
    """Batches, of the four after it, that hold the same pictures, in whatever order."""

    def words(out: Path, count: int, steps: int) -> list[str]:
        data = ["--data", str(pictures(place)), "--out", str(out)]
        return [*data, "--steps", str(steps), "--batch", str(4 // count)]

    whole, first = place.new("plain-whole"), place.new("plain-two")
    expect(place.plain_ranks(2, *words(whole, 2, 7)).wait(), 0)
    expect(place.plain_ranks(2, *words(first, 2, 3)).wait(), 0)
    wanted, found = seen(whole), {}
    for count in others:
        folder = place.new("plain-gone-on")
        shutil.copytree(first, folder, dirs_exist_ok=True)
        for path in folder.glob("seen-*.jsonl"):
            path.unlink()
        expect(place.plain_ranks(count, *words(folder, count, 7), "--resume").wait(), 0)
        got = seen(folder)
        found[count] = sum(
            sorted(got.get(step, ())) == sorted(wanted[step]) for step in range(4, 8)
        )
    return found


def damaged(bars: Bars, place: Place, quick: bool) -> list[Row]:
    tests = load(TESTS / "faults" / "test_damaged.py")
    (mark,) = tests.test_it_falls_back_by_one_and_says_so.pytestmark
    cases = mark.args[1][:3] if quick else mark.args[1]
    whole, three = place.new("whole"), place.new("three")
    expect(place.ours(whole, {}).wait(), 0)
    for step in (1, 2, 3):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(whole / name, three / name)

    def ours(spoil: Callable[[Path], None], name: str, says: str) -> bool:
        folder = place.new("damaged")
        shutil.copytree(three, folder, dirs_exist_ok=True)
        spoil(folder / "checkpoints" / "step-000003" / name)
        ended = place.ours(folder, {}).wait()
        told = "is damaged and passed over" in ended.said and says in ended.said
        back = "goes on after step 2" in ended.said
        same = ended.code == 0 and not any(unlike(place, whole, folder).values())
        return told and back and same

    good = in_turn([lambda c=case: ours(*c) for case in cases])  # type: ignore[misc]
    bars.exactly("damaged_fell_back", sum(good), len(cases))

    words = ("--data", str(pictures(place)), "--steps")
    plain_three, unbroken = place.new("plain-three"), place.new("plain-whole")
    expect(place.plain(*words, "3", "--out", str(plain_three)).wait(), 0)
    expect(place.plain(*words, "5", "--out", str(unbroken)).wait(), 0)

    def plain(spoil: Callable[[Path], None]) -> str:
        folder = place.new("plain-damaged")
        shutil.copytree(plain_three, folder, dirs_exist_ok=True)
        spoil(folder / "checkpoints" / "last.ckpt")
        (folder / "seen-0.jsonl").unlink()
        ended = place.plain(*words, "5", "--out", str(folder), "--resume").wait()
        if ended.code:
            return f"{ended.text()}, with two good checkpoints beside it"
        begun = min(seen(folder), default=0) - 1
        told = "no last checkpoint" in ended.said or "corrupt" in ended.said
        where = f"goes on after step {begun}" if begun else "begins anew"
        return f"{where}, {'with a warning' if told else 'and says nothing'}"

    kinds = {"cut": tests.cut, "one bit flipped": tests.flip, "empty": tests.empty}
    kinds["missing"] = Path.unlink
    did = in_turn([lambda s=spoil: plain(s) for spoil in kinds.values()])  # type: ignore[misc]
    bars.note("damaged", {"ours": good, "lightning": dict(zip(kinds, did, strict=True))})
    plainly = "; ".join(f"{kind}: {text}" for kind, text in zip(kinds, did, strict=True))
    return [
        Row(
            "a part of the newest checkpoint flipped, cut, emptied, removed, edited",
            f"{of(sum(good), len(cases))}: goes on from the one before, says so, ends with the "
            "unbroken run's weights",
            plainly,
        )
    ]


def disk(bars: Bars, place: Place, quick: bool) -> list[Row]:
    two = place.new("two")
    expect(place.ours(two, {}, "run.steps=2").wait(), 0)
    size = (two / "checkpoints" / "step-000002" / "state.pt").stat().st_size // 2

    def limited(policy: str) -> tuple[int | None, bool]:
        folder = place.new("limited")
        shutil.copytree(two, folder, dirs_exist_ok=True)
        (folder / "adapter.safetensors").unlink()
        faults = {"largest_file": {"size": size}}
        ended = place.ours(folder, faults, f"run.on_disk_full={policy}").wait()
        return ended.code, step_names(folder) == {1, 2} and sound(place, folder)

    (stop, kept), (go_on, kept_too) = in_turn(
        [lambda: limited("stop"), lambda: limited("continue")]
    )
    bars.exactly("disk_full_code", stop if stop is not None else -1, 74)
    bars.exactly("disk_full_continue_code", go_on if go_on is not None else -1, 0)
    bars.exactly("disk_full_old_whole", int(kept and kept_too), 1)
    words = ("--data", str(pictures(place)), "--steps")
    out = place.new("plain-limited")
    expect(place.plain(*words, "2", "--out", str(out)).wait(), 0)
    largest = (out / "checkpoints" / "last.ckpt").stat().st_size // 2
    limit = json.dumps({"largest_file": {"size": largest}})
    ended = place.plain(*words, "5", "--out", str(out), "--resume", "--faults", limit).wait()
    files = sorted((out / "checkpoints").glob("*.ckpt"))
    whole = [whole_file(path) for path in files]
    rows = [
        Row(
            "no file may grow beyond half a checkpoint",
            f"exit code {stop}, or by the other policy {go_on}; the checkpoints before it "
            f"{'stand' if kept and kept_too else 'are damaged'}",
            f"{ended.text()}; {of(sum(whole), len(files))} files read back",
        )
    ]
    return [*rows, *full_disk(bars, place)]


def full_disk(bars: Bars, place: Place) -> Iterator[Row]:
    """A real file system: room for three checkpoints and a half."""
    ours, plain = place.new("full"), place.new("plain-full")
    with small_disk(ours, "5m") as mounted:
        if not mounted:
            bars.note("full_file_system", "no file system may be mounted here")
            return
        (ours / "ballast").write_bytes(bytes(1_500_000))
        ended = place.ours(ours / "run", {}, "run.steps=4").wait()
        kept = step_names(ours / "run")
        good = sound(place, ours / "run") and kept == {1, 2, 3}
    bars.exactly("full_file_system_code", ended.code if ended.code is not None else -1, 74)
    bars.exactly("full_file_system_old_whole", int(good), 1)
    with small_disk(plain, "9m"):
        words = ("--data", str(pictures(place)), "--out", str(plain), "--steps", "9")
        left = place.plain(*words, environment=elsewhere()).wait()
        files = sorted((plain / "checkpoints").glob("*.ckpt"))
        cut = [path.name for path in files if not whole_file(path)]
        again = place.plain(*words, "--resume", environment=elsewhere()).wait()
    bars.note("full_file_system", {"ours": ended.code, "lightning": left.code, "cut": cut})
    yield Row(
        "a file system that is full after three checkpoints and a half",
        f"exit code {ended.code}; {len(kept)} checkpoints, {'all' if good else 'not all'} verified",
        f"{left.text()}; of {len(files)} files cut: {listed(cut)}; started again: {again.text()}",
    )
