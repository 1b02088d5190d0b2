"""Changes the code in many small ways and looks whether the tests notice.

    python tests/mutation/run.py                      # 160 changes over four rooms
    python tests/mutation/run.py --seed 7 --count 40  # another sample
    python tests/mutation/run.py --rooms diffusion --count 1000   # every change of a room
    python tests/mutation/run.py --key 0123abcdef     # one change, with the output of its tests
    python tests/mutation/run.py --seed 1 --write     # adds them to results.json and report.md
    python tests/mutation/run.py --again --write      # tries what results.json says was not noticed
    python tests/mutation/run.py --thorough           # all tests of the room and of some others

Each change is made in a copy of the project. The tests that mirror the changed file run first, then
those that import it, then the pinned and the reference runs; a change is noticed when one fails.
What is left is tried `--again --thorough`, with more tests. The report lists what was not noticed,
with a reason from `explained.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from mutants import Mutant, mutants  # noqa: E402

RESULTS = HERE / "results.json"
ROOMS = ("training", "data", "config", "diffusion")
FIRST = ("tests/training/test_pinned.py", "tests/training/test_reference_loop.py")
LIMIT = 300  # seconds for a group of tests of one change; one that hangs is noticed
COPIED = ("trainer", "tests", "recipes", "data", "slurm", "pyproject.toml", "docs", "bench")
PRELOADED = (
    "torch",
    "lightning.pytorch",
    "diffusers",
    "transformers",
    "peft",
    "pytest",
    "omegaconf",
)


def main(words: Sequence[str]) -> int:
    options = parsed(words)
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["noticed"] if RESULTS.is_file() else {}
    explained = json.loads((HERE / "explained.json").read_text(encoding="utf-8"))
    done = {key for key, by in known.items() if by or key in explained}
    every = recorded(known) if options.again else sample(options)
    chosen = [each for each in every if each.key not in done]
    print(f"{len(chosen)} changes, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copies.put(copied(Path(folder) / str(number)))
        check_unchanged(copies, options.limit)
        with ThreadPoolExecutor(options.jobs) as pool:
            ends = time.monotonic() + 60 * options.minutes
            results = list(
                pool.map(lambda each: tried(each, copies, options=options, ends=ends), chosen)
            )
    known |= {each.key: by for each, by in zip(chosen, results, strict=True) if by is not None}
    text = report([(each, known[each.key]) for each in recorded(known)], explained)
    print(text)
    if options.write:
        facts = {"commit": commit(), "noticed": known}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (HERE / "report.md").write_text(text, encoding="utf-8")
    return 0


def recorded(known: dict[str, str]) -> list[Mutant]:
    """The changes of earlier runs that the code still has a place for."""
    files = [path for room in ROOMS for path in sorted((ROOT / "trainer" / room).rglob("*.py"))]
    found = {each.key: each for path in files for each in mutants(path, ROOT)}
    return [found[key] for key in known if key in found]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rooms", nargs="+", default=list(ROOMS))
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--key", help="one change alone, by its key in the report")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--again", action="store_true", help="only what was not noticed before")
    parser.add_argument("--minutes", type=float, default=600, help="begin no change after so long")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds for one group of tests")
    parser.add_argument("--thorough", action="store_true")
    return parser.parse_args(words)


def sample(options: argparse.Namespace) -> list[Mutant]:
    """As many changes of each file as its share of all, at least one."""
    folders = [ROOT / "trainer" / room for room in options.rooms]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    found = {path: mutants(path, ROOT) for path in files}
    if options.key:
        return [each for own in found.values() for each in own if each.key == options.key]
    total = sum(map(len, found.values()))
    rng = random.Random(options.seed)
    chosen: list[Mutant] = []
    for own in found.values():
        share = max(1, round(options.count * len(own) / total))
        chosen += rng.sample(own, min(share, len(own)))
    return rng.sample(chosen, min(options.count, len(chosen)))


def copied(place: Path) -> Path:
    for name in COPIED:
        source, target = ROOT / name, place / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.png")
            shutil.copytree(source, target, ignore=ignore)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return place


def check_unchanged(copies: SimpleQueue[Path], limit: int) -> None:
    """Without a change the first tests pass; else every change would count as noticed."""
    place = copies.get()
    if not passes(place, list(FIRST), loud=True, limit=limit):
        raise SystemExit("the tests fail without any change; fix that first")
    copies.put(place)


def tried(
    mutant: Mutant, copies: SimpleQueue[Path], *, options: argparse.Namespace, ends: float
) -> str | None:
    """By which tests a change was noticed, or ""; None if there was no time left to try it."""
    place, began = copies.get(), time.monotonic()
    if began > ends:
        copies.put(place)
        return None
    file = place / mutant.path
    before = file.read_text(encoding="utf-8")
    file.write_text(mutant.applied(before), encoding="utf-8")
    noticed = ""
    try:
        for stage in stages(mutant, place, options.thorough):
            if not passes(place, stage, bool(options.key), limit=options.limit):
                noticed = stage[0]
                break
    finally:
        file.write_text(before, encoding="utf-8")
        copies.put(place)
    took = time.monotonic() - began
    print(f"{took:5.0f} s  {'noticed' if noticed else 'SURVIVED':9}{line(mutant)}", flush=True)
    return noticed


def stages(mutant: Mutant, place: Path, thorough: bool) -> list[list[str]]:
    """Groups of tests, the likeliest to notice first."""
    path = Path(mutant.path)
    room, stem = path.parts[1], path.stem
    own = [str(each.relative_to(place)) for each in sorted(place.glob(f"tests/**/test_{stem}.py"))]
    own = [each for each in own if each not in FIRST]
    near = [each for each in importing(path, place) if each not in (*own, *FIRST)]
    groups = [own, near, [FIRST[0]], [FIRST[1]]]
    if thorough:
        groups += [[f"tests/{room}"], EXTRA.get(room, [])]
    return [group for group in groups if group]


def importing(path: Path, place: Path) -> list[str]:
    """The test files of the copy that import a module, but those that break whole runs."""
    parent, stem = ".".join(path.parent.parts), path.stem
    named = re.compile(rf"\b{parent}\.{stem}\b|from {parent} import [^\n]*\b{stem}\b")
    found = [
        each for each in sorted(place.glob("tests/**/test_*.py")) if "faults" not in each.parts
    ]
    texts = {str(each.relative_to(place)): each.read_text(encoding="utf-8") for each in found}
    return [each for each, text in texts.items() if named.search(text)]


EXTRA = {
    "training": ["tests/faults", "tests/test_continual.py", "tests/methods/test_generic.py"],
    "data": ["tests/config/test_sections.py", "tests/faults/test_data.py", "tests/evaluation"],
    "config": ["tests/cli", "tests/runs", "tests/test_continual.py"],
    "diffusion": ["tests/methods", "tests/evaluation"],
}


def passes(place: Path, tests: list[str], loud: bool = False, *, limit: int) -> bool:
    """Whether these tests pass in a fork of this process, which has loaded the large libraries."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_run, args=(place, tests, loud))
    child.start()
    child.join(limit)
    if child.exitcode is None:
        subprocess.run(["pkill", "-9", "-P", str(child.pid)], check=False)
        child.kill()
        child.join()
    return child.exitcode == 0


def _run(place: Path, tests: list[str], loud: bool) -> None:
    os.chdir(place)
    os.environ["PYTHONPATH"] = str(place)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(place))
    if not loud:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    import pytest

    marks = "not gpu and not long and not slow and not pairs"
    words = [*tests, "-x", "-q", "-m", marks, "-p", "no:cacheprovider", "-p", "no:xdist"]
    os._exit(int(pytest.main([*words, "-o", "addopts=--import-mode=importlib --strict-markers"])))


def line(mutant: Mutant) -> str:
    old, new = (" ".join(text.split())[:60] for text in (mutant.old, mutant.new))
    return (
        f"{mutant.key}  {mutant.path}:{mutant.line} {mutant.where}: {mutant.kind}: {old} -> {new}"
    )


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def report(results: Sequence[tuple[Mutant, str]], explained: dict[str, str]) -> str:
    """A table of what was noticed, by room, and each change that was not, with its reason."""
    by_room: dict[str, list[bool]] = {}
    for mutant, noticed in results:
        by_room.setdefault(Path(mutant.path).parts[1], []).append(bool(noticed))
    total = [found for own in by_room.values() for found in own]
    share = 100 * sum(total) / max(1, len(total))
    lines = [
        "# Changes to the code that the tests notice", "",
        "`python tests/mutation/run.py --write` with the seeds 0 and 1, then with",
        f"`--again --thorough`, last at {commit()}.",
        "",
        "| room | changes | noticed |", "|---|---|---|",
        *(f"| {room} | {len(own)} | {sum(own)} |" for room, own in sorted(by_room.items())),
        f"| all | {len(total)} | {sum(total)} ({share:.1f} %) |", "",
        f"BAR mutants_noticed {share:.1f} 90 {'ok' if share >= 90 else 'short'}", "",
        "Not noticed:", "",
    ]  # fmt: skip
    for mutant, noticed in results:
        if not noticed:
            lines.append(f"- `{line(mutant)}`: {explained.get(mutant.key, 'not explained')}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in PRELOADED:
        __import__(name)
    sys.exit(main(sys.argv[1:]))
