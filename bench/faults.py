"""The faults of docs/promises.md, done to this trainer, to an ordinary Lightning script and, where
it is about resuming and NaN, to a loop in the style of diffusers' examples; side by side.

    python bench/faults.py
    python bench/faults.py --only resume,kill
    python bench/faults.py --quick

Every cell is what really happened: processes are killed, signalled and fed nonsense, files and
disks are damaged and filled up, and what is left is looked at. The scripts beside this one are
_plain_lightning.py and _accelerate_loop.py; they are written as the documentation of their
libraries has it, with `ckpt_path="last"` and `skip_first_batches`. This trainer's faults are those
of its tests, tests/faults/driver.py.

Two processes run at a time, on one thread each. With --only the figures of the other parts stay as
they are in the result file. Quick: fewer points of everything; writes nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["no_proxy"] = "127.0.0.1"

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _fault_data as data
import _fault_run as run
import _fault_state as state
from _common import RESULTS, Bars, chosen_of, parser_of
from _fault_left import Part, Row
from _faulty import Place


def guards(bars: Bars, place: Place, quick: bool) -> list[Row]:
    """What they cost; needs the machine to itself."""
    from _guards import ADAPTER, FULL, cost, inside, stall

    added, hooks = cost(*((3, 4) if quick else (20, 12))), inside(4 if quick else 20)
    bars.at_most("guards_percent_of_step", added["percent"], 1)
    saves = 4 if quick else 20
    adapter, full = stall(saves, *ADAPTER), stall(saves // 2, *FULL)
    bars.at_most("adapter_save_stall_ms", adapter["median_ms"], 100)
    bars.note("guards", {"cost": added, "inside": hooks, "adapter": adapter, "full": full})
    return [
        Row(
            "nothing: what the guards cost",
            f"{added['percent']:.1f} % of a step of {added['step_ms']:.0f} ms (quartiles "
            f"{added['low']:.1f} and {added['high']:.1f} of {added['pairs']} pairs; in the guards' "
            f"own code {hooks['hooks_ms']:.1f} ms)",
            "-",
        ),
        *(
            Row(
                f"nothing: what a save of {name} holds up, {size['bytes'] / 1e6:.1f} MB",
                f"{size['median_ms']:.0f} ms, at most {size['largest_ms']:.0f}",
                "-",
            )
            for name, size in (("an adapter's run", adapter), ("a full fine-tuning's", full))
        ),
    ]


PARTS: dict[str, Part] = {
    "guards": guards, "resume": state.resume, "kill": state.kill, "ranks": state.ranks,
    "damaged": state.damaged, "disk": state.disk, "signals": run.signals,
    "nonfinite": run.nonfinite, "shards": data.shards, "images": data.images,
    "uneven": data.uneven, "workers": run.workers, "trackers": run.trackers,
}  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    lines = [
        "| | fault | this trainer | plain Lightning | accelerate loop |",
        "|---|---|---|---|---|",
    ]
    for part in PARTS:
        for row in figures.get(f"rows_{part}", ()):
            cells = [part, row["fault"], row["ours"], row["lightning"], row["accelerate"]]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__, list(PARTS))
    options = parser.parse_args()
    bars = Bars("faults", options.quick, update=bool(options.only))
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        try:
            for name in chosen_of(options.only, list(PARTS), parser):
                began = time.monotonic()
                rows = PARTS[name](bars, place, options.quick)
                bars.found[f"rows_{name}"] = [asdict(row) for row in rows]
                bars.write()
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        finally:
            place.close()
    text = table(bars.found)
    print(text)
    if not options.quick:
        (RESULTS / "faults.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
