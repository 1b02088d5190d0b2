"""Speed and memory beside the scripts people run today, and beside the least a step can take.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python bench/peers.py --examples ./diffusers/examples [--python ./env/bin/python]
    python bench/peers.py --only methods,sampling,checkpointing,loader,start,layout,tight
    python bench/peers.py --quick --only lora --examples ./diffusers/examples

The scripts of diffusers' examples run unmodified, none of them is part of this repository. They
import torchvision and datasets; --python names an environment that has both beside this project,
`pip install --no-deps torchvision datasets ftfy` into a copy of this one. Parts that need them:

- lora, narrow: the same work on both sides, nothing cached, every loss logged: rank 8 on all
  attention, fp32; on the shipped U-Net, and on SD 1.5's with less than a third of its channels
- user: LoRA, full, DreamBooth LoRA and Custom Diffusion with each side's own defaults
- whole: Custom Diffusion from the command to the adapter, class images included

and parts that do not:

- tight: a step of `fit` over a plain loop around the same layers
- methods: LoRA over full, DoRA over LoRA, QLoRA over LoRA
- sampling: 25 steps at guidance over the stock pipeline, and how far the pictures are apart
- compile: 500 steps with and without, the time of compiling counted
- checkpointing: memory and time, the text encoder trained; loader: how long steps of 100 ms wait
  for data; start: seconds of commands; layout: channels last on this machine

Two programs train in turns, A B A B, some steps each (bench/_turns.py). A figure is the median over
pairs of the ratio of processor time, unless it says wall, with quartiles; --threads sets theirs.
The full run writes results/peers.json; parts that are not taken again keep their figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import _peer_parts as parts
from _common import Bars, chosen_of, parser_of
from _peer_jobs import NOTHING_KEPT, Job, jobs, loss_difference, make_data, replaced

HERE = Path(__file__).parent
TINY = HERE.parent / "data" / "tiny"
BESIDE = ("lora", "narrow", "user", "whole")  # parts that need the scripts
WARM = 3
MEASURES = ("processor", "wall")


@dataclass(frozen=True)
class Lengths:
    """pairs of turns, steps of a turn, and steps of a whole run."""

    pairs: int = 5
    steps: int = 10
    whole: int = 100


@dataclass(frozen=True)
class Place:
    """Where programs run: examples and the interpreter of the scripts, a scratch folder."""

    examples: Path
    python: str
    folder: Path
    threads: int

    def environment(self) -> dict[str, str]:
        found = {name: own for name, own in os.environ.items() if name != "TRAINER_RUN_ID"}
        found |= {"TRAINER_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        found |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(HERE.parent)}
        return found | {"HF_HOME": str(self.folder / "hub"), "TRANSFORMERS_VERBOSITY": "error"}


class Program:
    """A program that trains in turns."""

    def __init__(self, place: Place, name: str, words: Sequence[str], python: str) -> None:
        self.name, self.log = name, place.folder / f"{name}.log"
        (asked, self.ask), (self.told, tell) = os.pipe(), os.pipe()
        environment = place.environment() | {"TURNS_ASK": str(asked), "TURNS_TELL": str(tell)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, str(HERE / "_turns.py"), str(WARM), *words],
                cwd=place.folder,
                env=environment,
                pass_fds=(asked, tell),
                stdout=log,
                stderr=log,
            )
        os.close(asked)
        os.close(tell)
        self.lines = os.fdopen(self.told)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.ask)
        self.process.kill()
        self.process.wait()
        self.lines.close()

    def line(self) -> str:
        if not (line := self.lines.readline()):
            text = self.log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"{self.name} ended with {self.process.wait()}:\n{text}")
        return line.strip()

    def turn(self, steps: int) -> dict[str, float]:
        os.write(self.ask, f"{steps}\n".encode())
        found: dict[str, float] = json.loads(self.line())
        return found


def our_words(words: Sequence[str], place: Place, name: str) -> list[str]:
    return ["trainer", "fit", *words, f"run.out={place.folder / 'runs' / name}", "run.device=cpu"]


def their_words(job: Job, place: Place, name: str) -> list[str]:
    return [str(place.examples / job.script), *job.theirs, "--output_dir",
            str(place.folder / "theirs" / name)]  # fmt: skip


def in_turns(first: Program, second: Program, lengths: Lengths) -> dict[str, Any]:
    """Of each measure, how many times as much the second takes as the first, pair by pair."""
    for each in (first, second):
        if each.line() != "ready":
            raise SystemExit(f"{each.name} does not say that it is ready")
    pairs = [(first.turn(lengths.steps), second.turn(lengths.steps)) for _ in range(lengths.pairs)]
    found: dict[str, Any] = {}
    for measure in MEASURES:
        ratios = [theirs[measure] / ours[measure] for ours, theirs in pairs]
        low, _, high = quantiles(ratios, n=4)
        found[measure] = {"median": median(ratios), "low": low, "high": high}
        for number, each in enumerate((first, second)):
            own = median(pair[number][measure] / lengths.steps for pair in pairs)
            found[f"{each.name}_{measure}_ms"] = 1000 * own
    for number, each in enumerate((first, second)):
        found[f"{each.name}_peak_bytes"] = pairs[-1][number]["peak_bytes"]
        found[f"{each.name}_loss"] = sum(pair[number]["loss"] for pair in pairs) / len(pairs)
    found["memory"] = pairs[-1][0]["peak_bytes"] / pairs[-1][1]["peak_bytes"]
    last = [{"loss": found[f"{each.name}_loss"]} for each in (first, second)]
    found["losses_apart"] = loss_difference(last[0], last[1])
    return found


def compared(job: Job, place: Place, name: str, lengths: Lengths, more: Sequence[str]) -> Any:
    """Ours and theirs in turns. more: words of ours beside the job's."""
    with ExitStack() as stack:
        words = our_words((*job.ours, *more), place, name)
        ours = stack.enter_context(Program(place, f"ours_{name}", words, sys.executable))
        words = their_words(job, place, name)
        theirs = stack.enter_context(Program(place, f"theirs_{name}", words, place.python))
        return in_turns(ours, theirs, lengths)


def lora(bars: Bars, place: Place, lengths: Lengths) -> None:
    _identical(bars, place, lengths, name="lora", backbone=TINY, bar=1.5)


def narrow(bars: Bars, place: Place, lengths: Lengths) -> None:
    from memory import make_folder

    folder = place.folder / "narrow_sd15"
    if not folder.exists():
        make_folder("narrow_sd15", str(folder))
    _identical(bars, place, lengths, name="narrow", backbone=folder, bar=1.3)


def _identical(
    bars: Bars, place: Place, lengths: Lengths, *, name: str, backbone: Path, bar: float
) -> None:
    side, batch = (64, 8) if backbone == TINY else (256, 2)
    data = _data(place, side)
    job = jobs(data, backbone, side, batch)["lora"]
    found = compared(job, place, name, lengths, NOTHING_KEPT)
    bars.note(f"{name}_identical", found)
    bars.at_least(f"{name}_identical_faster", found["processor"]["median"], bar)
    bars.at_most(f"{name}_identical_memory", found["memory"], 0.7)


def user(bars: Bars, place: Place, lengths: Lengths) -> None:
    data = _data(place, 64)
    for name, job in jobs(data, TINY, 64, 8).items():
        found = compared(job, place, f"user_{name}", lengths, ())
        bars.note(f"user_{name}", found)
        bars.at_least(f"user_{name}_faster_wall", found["wall"]["median"], 2.5)
        bars.at_most(f"user_{name}_memory", found["memory"], 0.6)


def whole(bars: Bars, place: Place, lengths: Lengths) -> None:
    """Each makes as many class images in as many sampler's steps."""
    data, steps, images = _data(place, 64), lengths.whole, max(4, lengths.whole // 5)
    job = jobs(data, TINY, 64, 8)["custom_diffusion"]
    ratios = []
    for number in range(max(1, lengths.pairs // 2)):
        made = place.folder / f"whole-{number}"
        theirs = replaced(
            job.theirs, max_train_steps=steps, class_data_dir=made / "class",
            num_class_images=images,
        )  # fmt: skip
        theirs_job = replace(job, theirs=(*theirs, "--sample_batch_size", "4"))
        words = [w for w in job.ours if not w.startswith(("data.prior_folder", "run.steps"))]
        words += [f"run.steps={steps}", f"data.prior_images={images}", "data.prior_steps=50"]
        alone = replace(place, folder=made)  # with an empty cache
        made.mkdir()
        seconds = [
            _seconds([sys.executable, "-m", *our_words(words, alone, "whole")], alone),
            _seconds([place.python, str(HERE / "_turns.py"), str(steps + 1),
                      *their_words(theirs_job, alone, "whole")], alone),
        ]  # fmt: skip
        bars.note(f"whole_{number}_seconds", dict(zip(("ours", "theirs"), seconds, strict=True)))
        ratios.append(seconds[1] / seconds[0])
    bars.at_least("whole_custom_diffusion_faster_wall", median(ratios), 2.5)


def _seconds(line: Sequence[str], place: Place) -> float:
    environment = place.environment() | {"TURNS_ASK": "0", "TURNS_TELL": "1"}
    began = time.monotonic()
    done = subprocess.run(line, cwd=place.folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.monotonic() - began


def tight(bars: Bars, place: Place, lengths: Lengths) -> None:
    """Our command against a plain loop around the same layers, latents and texts kept."""
    job = jobs(_data(place, 64), TINY, 64, 8)["lora"]
    with ExitStack() as stack:
        words = our_words(job.ours, place, "tight")
        ours = stack.enter_context(Program(place, "fit", words, sys.executable))
        loop = [str(HERE / "_tight_loop.py"), *job.ours]
        plain = stack.enter_context(Program(place, "plain_loop", loop, sys.executable))
        found = in_turns(plain, ours, lengths)
    bars.note("tight", found)
    bars.at_most("step_over_tight_loop", found["processor"]["median"], 1.02)


def _data(place: Place, side: int) -> Path:
    folder = place.folder / f"data-{side}"
    if not folder.exists():
        make_data(folder, side)
    return folder


PROGRAMS: Mapping[str, Callable[[Bars, Place, Lengths], None]] = {
    "lora": lora, "narrow": narrow, "user": user, "whole": whole, "tight": tight,
}  # fmt: skip


def main() -> None:
    known = (*PROGRAMS, *parts.PARTS)
    parser = parser_of(__doc__, known)
    parser.add_argument("--examples", type=Path, help="the folder examples/ of a copy of diffusers")
    parser.add_argument("--python", default=sys.executable, help="what runs the scripts")
    parser.add_argument("--threads", type=int, default=1, help="of each program")
    options = parser.parse_args()
    chosen = chosen_of(options.only, known, parser)
    if options.examples is None and (needing := [each for each in chosen if each in BESIDE]):
        parser.error(
            f"{', '.join(needing)} compare with diffusers' examples, which are not part of this "
            "repository: git clone --depth 1 https://github.com/huggingface/diffusers, then "
            "--examples ./diffusers/examples; or choose other parts with --only"
        )
    if options.examples is not None and not (options.examples / "text_to_image").is_dir():
        parser.error(f"--examples {options.examples}: there is no folder text_to_image in it")
    bars = Bars("peers", options.quick, update=True)
    bars.note_when()
    quick = Lengths(pairs=2, steps=2, whole=4)
    lengths = quick if options.quick else Lengths()
    with tempfile.TemporaryDirectory() as scratch:
        examples = (options.examples or HERE).resolve()
        place = Place(examples, options.python, Path(scratch), options.threads)
        for name in chosen:
            if name in PROGRAMS:
                PROGRAMS[name](bars, place, lengths)
            else:
                parts.PARTS[name](bars, lengths.pairs, quick=options.quick)
    bars.write()


if __name__ == "__main__":
    main()
