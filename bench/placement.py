"""Where attention stands in a U-Net: what each placement costs, and gives after equal steps.

    python bench/placement.py --keep ./kept
    python bench/placement.py --quick

The rule for U-Nets on pixels is: attention on the coarsest grid always (the bottleneck, 16 x 16 of
a picture of 256), on the one or two above it, and on no finer one. Here the latents of a picture of
64 pixels are 16 x 16, and three levels have the grids 16, 8 and 4: 4 is the bottleneck, 8 the grid
above it, and 16 the finest, which that rule would leave out and which has as many tokens as its
coarsest. The middle block, also on grid 4, has no attention in any row: diffusers gives it a second
residual block with it, and the rows would not differ by attention alone.

Each placement is taken twice. `self`: self-attention alone, and no row sees the text. `self+cross`:
both on the same grids, as in Stable Diffusion; what they gain over the row without attention is
then also the text's. All rows of a seed begin as the same function, to the last bit, and meet the
same pictures, captions and noise, in training and in validation: losses compare within a seed.

Step time: whole training steps in turn (A B A B), each round's ratio to the network without
attention; median and quartiles, on one thread. Runs stay under --keep: a finished one is not made
again unless its recipe has changed. Quick: a few steps of three rows; writes nothing. Further words
go to every `fit`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from _common import RESULTS, Bars, parser_of
from _runs import Run, Runs
from torch import Tensor

from trainer.evaluation.evaluate import validation_loss
from trainer.runs.adapter import load_adapted
from trainer.training.build import needs

PLACES = {"bottleneck": [4], "8": [8], "8+16": [16, 8], "all": [16, 8, 4]}
SHAPE = ("denoiser.width=[32,64,64]", "denoiser.heads=2", "denoiser.groups=8")
TRAINING = (
    "run.steps=1000",
    "run.batch_size=16",
    "run.precision=fp32",
    "run.checkpoint_every=0",
    "data.count=4096",
    "data.validation=256",
    "objective.timesteps=uniform",  # as those of the validation loss
    "optim.warmup=50",
    "optim.ema=null",  # an average over so few steps would be of the beginning
)
QUICK = ("run.steps=3", "data.count=32", "data.validation=16")
QUICK_ROWS = ("none", "8+16 self", "all self+cross")
AGAIN = ("none", "8+16 self+cross", "all self+cross")  # with a second seed, too


def words(grids: list[int], text: bool, seed: int) -> tuple[str, ...]:
    places = f"denoiser.self_attention={grids}", f"denoiser.cross_attention={grids if text else []}"
    seeds = f"run.seed={seed}", f"denoiser.seed={seed}"
    return ("recipe=unet_scratch", *SHAPE, *TRAINING, *places, *seeds)


def rows(seed: int) -> dict[str, Run]:
    """A seed's runs, by the name of the row."""
    found = {"none": words([], False, seed)}
    for kind in ("self", "self+cross"):
        for name, grids in PLACES.items():
            found[f"{name} {kind}"] = words(grids, kind != "self", seed)
    return {
        name: Run(f"{name.replace(' ', '-').replace('+', '-')}-{seed}", each, judged=False)
        for name, each in found.items()
    }


def costs(bars: Bars, runs: Runs, every: Mapping[str, Run]) -> dict[str, dict[str, float]]:
    """Parameters and step time of every row, and that all begin alike."""
    from _steps import Step, interleaved

    torch.set_num_threads(1)
    # the batch that is timed needs no more pictures than itself
    made = {n: Step(runs.words_of(run, "data.count=32")) for n, run in every.items()}
    starts = {name: start(step.backbone) for name, step in made.items()}
    apart = max(float((each - starts["none"]).abs().max()) for each in starts.values())
    bars.exactly("start_difference", apart, 0.0)
    sizes = {n: sum(p.numel() for p in step.backbone.unet.parameters()) for n, step in made.items()}
    timed = interleaved(made, 3 if bars.quick else 20, "none")
    return {
        name: {
            "parameters": sizes[name],
            "step_ms": time["step_ms"],
            "slower": 1 / time["faster"],
            "slower_low": 1 / time["faster_high"],
            "slower_high": 1 / time["faster_low"],
        }
        for name, time in timed.items()
    }


@torch.no_grad()
def start(backbone: Any) -> Tensor:
    x_t = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = backbone.encode_prompts(["a fox", "a star above a cat", "", "a big pizza"])
    output: Tensor = backbone.predict(x_t, torch.tensor([10, 300, 700, 990]), condition)
    return output


def validated(runs: Runs, run: Run) -> float:
    """The validation loss of a run."""
    chosen = runs.recipe(run)
    backbone, _ = load_adapted(runs.place(run) / "adapter.safetensors")
    _, held_out = chosen.data.open(needs(chosen, backbone))
    loss = validation_loss(chosen, backbone, held_out)
    assert loss is not None
    return loss


def table(found: Mapping[str, Mapping[str, float]], losses: Mapping[str, list[float]]) -> str:
    lines = [
        "| attention | grids | parameters | step, ms | step over none (quartiles) "
        "| validation loss, each seed | less than none |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        less = [1 - own / none for own, none in zip(losses[name], losses["none"], strict=False)]
        place, _, kind = name.partition(" ")
        spread = f"{row['slower']:.2f} ({row['slower_low']:.2f} to {row['slower_high']:.2f})"
        cells = [
            kind or "none",
            f"{place}: {', '.join(map(str, PLACES[place]))}" if kind else "-",
            f"{row['parameters']:,}",
            f"{row['step_ms']:.0f}",
            spread if kind else "1",
            ", ".join(f"{loss:.4f}" for loss in losses[name]),
            ", ".join(f"{100 * share:.1f} %" for share in less) if kind else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    parser = parser_of(__doc__, keeps=True, words=True)
    options = parser.parse_args()
    quick = options.quick
    bars = Bars("placement", quick)
    first = Run("latents", (*words([], False, 0), "run.steps=1"), judged=False)
    with tempfile.TemporaryDirectory() as scratch:
        changed = (*(QUICK if quick else ()), *options.words)
        runs = Runs(options.keep or Path(scratch), changed, 0, first)
        every = {name: run for name, run in rows(0).items() if not quick or name in QUICK_ROWS}
        again = {} if quick else {name: rows(1)[name] for name in AGAIN}
        found = costs(bars, runs, every)
        runs.make([*every.values(), *again.values()])
        losses = {name: [validated(runs, run)] for name, run in every.items()}
        for name, run in again.items():
            losses[name].append(validated(runs, run))
        for name, row in found.items():
            bars.note(name, {**row, "validation_loss": losses[name]})
        bars.note("training", runs.words_of(every["none"]))
    bars.write()
    text = table(found, losses)
    print(text)
    if not quick:
        (RESULTS / "placement.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
