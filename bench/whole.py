"""What bears a paper's name against the paper's claim, on the small backbone.

    python bench/whole.py --keep ./kept
    python bench/whole.py --only longlora_step
    python bench/whole.py --quick

The parts are `PARTS`. With --only the other figures stay as they are in the result file. Quick: few
steps, which learn nothing, in a few minutes. Further words go to every `fit`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import _whole_blocks
from _common import Bars, chosen_of, parser_of, shares_of
from _runs import Run, Runs
from _steps import Step, facts, interleaved
from _whole_between import imagen_video, interpolation, temporal_sr
from _whole_domain import domain, domain_control
from _whole_structure import gen1, gen1_direction, magicvideo
from _whole_videop2p import videop2p, videop2p_beside, videop2p_two
from _whole_zero import background

QUICK = ("run.steps=2", "evaluate.steps=2")
ALONE = "data.prior_weight=0"  # a batch of the concept alone: class images would have to be painted
# class images of this side are painted once for both
PRIOR = Run("prior_128", ("recipe=lora", "run.resolution=128", "run.steps=1"), judged=False)
LONG = {  # 1,024 tokens each, after as many steps
    "lora": Run("lora_128", ("recipe=lora", "run.resolution=128")),
    "longlora": Run("longlora_128", ("recipe=longlora_128",)),
}


def longlora_step(bars: Bars, runs: Runs) -> None:
    """Time of a training step at 1,024 tokens, LoRA and LongLoRA in turns."""
    every = {name: runs.words_of(run, ALONE) for name, run in LONG.items()}
    made = {name: Step(words) for name, words in every.items()}
    timed = interleaved(made, 5 if bars.quick else 31, "lora")
    bars.note("longlora_steps", {name: timed[name] | facts(made[name]) for name in made})
    bars.at_least("longlora_step_faster", timed["longlora"]["faster"], 1.3)


def longlora(bars: Bars, runs: Runs) -> None:
    """How often the concept is right at 128 x 128, with LoRA and with LongLoRA."""
    alone = (ALONE,) if bars.quick else ()
    every = {name: Run(run.name, (*run.words, *alone)) for name, run in LONG.items()}
    steps = {name: runs.recipe(run).run.steps for name, run in every.items()}
    assert len(set(steps.values())) == 1, "both are to train as long"
    if not bars.quick:
        runs.make([PRIOR])
    runs.make(every.values())
    found = {
        name: shares_of(runs.read(run, "evaluation.json"), "adapted") for name, run in every.items()
    }
    for name, scores in found.items():
        bars.note(f"longlora_128_{name}", {**scores, "minutes": runs.minutes(every[name])})
    lost = found["lora"]["concept accuracy"] - found["longlora"]["concept accuracy"]
    if bars.quick:
        bars.note("longlora_points_lost", 100 * lost)
    else:
        bars.at_most("longlora_points_lost", 100 * lost, 2)


PARTS: dict[str, Callable[[Bars, Runs], None]] = {
    "longlora_step": longlora_step,
    "longlora": longlora,
    "gen1": gen1,
    "gen1_direction": gen1_direction,
    "magicvideo": magicvideo,
    "domain": domain,
    "domain_control": domain_control,
    "background": background,
    **_whole_blocks.PARTS,
    "imagen_video": imagen_video,
    "interpolation": interpolation,
    "temporal_sr": temporal_sr,
    "videop2p": videop2p,
    "videop2p_beside": videop2p_beside,
    "videop2p_two": videop2p_two,
}


def main() -> None:
    parser = parser_of(__doc__, list(PARTS), keeps=True, words=True)
    options = parser.parse_args()
    parts = chosen_of(options.only, list(PARTS), parser)
    bars = Bars("whole", options.quick, update=bool(options.only))
    words = (*(QUICK if options.quick else ()), *options.words)
    with tempfile.TemporaryDirectory() as scratch:
        folder, images = options.keep or Path(scratch), 4 if options.quick else 32
        runs = Runs(folder, words, images, first=None)
        for part in parts:
            PARTS[part](bars, runs)
            bars.write()


if __name__ == "__main__":
    main()
