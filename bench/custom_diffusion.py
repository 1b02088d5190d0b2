"""The default run of `recipes/custom_diffusion.yaml`, from the command to the judged pictures.

    python bench/custom_diffusion.py [--quick] [words for fit, as in run.steps=200]

Quick: one run with fewer pictures judged; full: the run twice, to see that it is bit-identical.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from pathlib import Path

from _common import Bars, command, parser_of, shares_of


def main() -> None:
    parser = parser_of(__doc__, keeps=True, words=True)
    options = parser.parse_args()
    bars = Bars("custom_diffusion", options.quick)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        fit = ("recipe=custom_diffusion", *options.words)
        # its own empty cache: the first run of a fresh machine paints its class images too
        run = (
            folder
            / command("fit", *fit, "run.id=a", folder=folder, cache=folder / "cache-a").split()[-1]
        )
        minutes = (time.monotonic() - begin) / 60
        bars.at_most("minutes_all_included", minutes, 5.0)
        plan = json.loads((run / "plan.json").read_text())
        size = (run / "adapter.safetensors").stat().st_size
        bars.at_most("adapter_over_tensors", size / plan["adapter_bytes"], 1.2)
        bars.note("parameters_trained", plan["trained"])
        command("evaluate", f"run={run}", folder=folder, cache=folder / "cache-a")
        table = json.loads((run / "evaluation.json").read_text())
        base, adapted = shares_of(table, "base"), shares_of(table, "adapted")
        bars.at_least("concept", adapted["concept accuracy"], 0.85)
        bars.at_most("concept_base", base["concept accuracy"], 0.05)
        bars.at_least("concept_beside", adapted["concept beside another"], 0.55)
        bars.at_least("other_beside", adapted["the other beside it"], 0.55)
        bars.at_most(
            "known_lost_points", 100 * (base["known sprites"] - adapted["known sprites"]), 3
        )
        of_known = adapted["fidelity"] / adapted["fidelity of known sprites"]
        bars.at_least("fidelity_over_known", of_known, 0.8)
        bars.at_least("second_judge_concept", adapted["second judge: concept"], 0.8)
        beside = adapted["second judge: concept beside another"]
        bars.at_least("second_judge_beside", beside, 0.6)
        bars.note("evaluation", {**table, "base": base, "adapted": adapted})
        if not options.quick:
            second = command(
                "fit", *fit, "run.id=b", folder=folder, cache=folder / "cache-b"
            ).split()[-1]
            same = digest(run) == digest(folder / second)
            bars.at_least("same_seed_same_bits", float(same), 1)
        bars.write()


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
