"""Layout, pinned runs, what the tests notice, and how long they take.

    python bench/house.py                    # all parts, about an hour: `mutants` takes the longest
    python bench/house.py --quick            # layout, pinned runs, class images: under five minutes
    python bench/house.py --only suite

layout: import circles, imports upwards, method or family names in `attention/`, loose modules,
long functions and files. pinned: how many of eight recipes give the pinned losses and adapter.
mutants: the share of 160 changes to the code that the tests notice. placements: models that run on
another device than the chosen one, over every verb. class_images: 160 are begun, the process is
killed after 40, and started again. suite: minutes of `pytest -n auto`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import Bars, chosen_of, parser_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import house  # noqa: E402

PARTS = ("layout", "pinned", "class_images", "placements", "mutants", "suite")
QUICK = ("layout", "pinned", "class_images")
IMAGES, KILLED_AT = 160, 40


def main() -> None:
    parser = parser_of(__doc__, PARTS)
    options = parser.parse_args()
    chosen = chosen_of(options.only, PARTS, parser)
    bars = Bars("house", options.quick, update=True)
    for part in chosen:
        if not options.quick or options.only or part in QUICK:
            globals()[part](bars)
    bars.note_when()
    bars.write()


def layout(bars: Bars) -> None:
    root = ROOT / "trainer"
    bars.exactly("import_circles", len(house.import_circles(root)), 0)
    upward = house.upward_imports(root) + house.neighbours_both_ways(root)
    bars.exactly("imports_upward", len(upward), 0)
    bars.exactly("foreign_names_in_attention", len(house.foreign_names(root)), 0)
    loose = [path for path in root.glob("*.py") if path.stem != "__init__"]
    bars.at_most("loose_modules", len(loose), 3)
    bars.at_most("functions_over_40_lines", len(house.long_functions(root)), 5)
    bars.at_most("files_over_320_lines", len(house.long_files(root)), 5)
    bars.exactly("calls_with_over_3_positional", len(house.crowded_calls(root)), 0)


def pinned(bars: Bars) -> None:
    text = _output(sys.executable, "tests/training/pinned.py", OMP_NUM_THREADS="1")
    bars.exactly("pinned_recipes", len(re.findall(r"^\w+ as pinned$", text, re.M)), 8)


def class_images(bars: Bars) -> None:
    """A `fit` of Custom Diffusion is killed while it generates its class images."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        words = ["recipe=custom_diffusion", f"data.prior_images={IMAGES}", "data.prior_steps=4"]
        words += ["run.steps=1", "preview.every=0", "tracker=none", "run.validate_every=0"]
        line = [sys.executable, "-m", "trainer", "fit", *words, f"run.out={folder}/runs"]
        environment = {**os.environ, "TRAINER_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(line, cwd=folder, env=environment, stdout=quiet, stderr=quiet)
        while len(_images(cache)) < KILLED_AT and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = {path: path.stat().st_mtime_ns for path in _images(cache)}
        subprocess.run(line, cwd=folder, env=environment, check=True, capture_output=True)
        kept = sum(path.stat().st_mtime_ns == when for path, when in before.items())
        bars.note("class_images_before_the_kill", len(before))
        bars.at_least("class_images_kept", kept, KILLED_AT)
        bars.exactly("class_images_in_the_end", len(_images(cache)), IMAGES)


def _images(cache: Path) -> list[Path]:
    return [path for path in cache.glob("prior/*/*.png") if not path.name.startswith(".")]


def placements(bars: Bars) -> None:
    """The test records every module's device at every forward call; it fails at the first miss."""
    code = _status(sys.executable, "-m", "pytest", "-q", "tests/cli/test_device.py")
    bars.exactly("placements_missed", int(code != 0), 0)


def mutants(bars: Bars) -> None:
    text = _output(sys.executable, "tests/mutation/run.py", "--write")
    found = re.search(r"^BAR mutants_noticed ([\d.]+)", text, re.M)
    assert found is not None, text[-2000:]
    bars.at_least("mutants_noticed_percent", float(found[1]), 90)


def suite(bars: Bars) -> None:
    began = time.monotonic()
    code = _status(sys.executable, "-m", "pytest", "-n", "auto", "-q")
    bars.at_most("suite_minutes", (time.monotonic() - began) / 60, 12)
    bars.exactly("suite_exit_code", code, 0)


def _output(*words: str, **environment: str) -> str:
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.stdout


def _status(*words: str) -> int:
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    main()
