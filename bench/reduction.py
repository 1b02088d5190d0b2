"""Less attention: what each method that reduces it saves, and what is left of the picture.

    python bench/reduction.py
    python bench/reduction.py --only step,blocks
    python bench/reduction.py --quick

The parts are `PARTS`; with --only the other figures stay as they are in the result file. `step`:
one call of the denoiser with random weights, as Stable Diffusion 1.5 narrowed to two of eight heads
and as a joint transformer: FLOP as counted, time in turns with dense attention, peak memory, PSNR
of the output. `pictures`: shipped backbones sample the same prompts and seeds; PSNR and the judge.
`blocks`, `sla`: attention alone at 16,384 tokens. `distilled`: recipe=sla, judged. `exact`: what
reduces nothing changes no bit. `tread`: two trainings from scratch, some 20 minutes each.
diffusers' pyramid attention broadcast is measured in the same turns, and tomesd where it is
installed (`pip install tomesd`). Time over PSNR is drawn into bench/results/reduction.png. Quick:
smaller, some minutes; trains nothing and writes nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import RESULTS, Bars, chosen_of, command, parser_of
from _reduced_steps import WAYS, ReducedStep, flop_of, peak_megabytes, psnr
from attention_kernels import Clock, interleaved
from linear_swap import Painter
from torch import Tensor

from trainer.config.load import load_recipe, methods_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.kernels.block_sparse import ChosenBlocks, block_sparse
from trainer.kernels.sla import Shares, sparse_and_linear
from trainer.kernels.softmax import sdpa
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted

TOKENS, WIDTH = 16_384, 64
NOTHING: dict[str, dict[str, Any]] = {  # what reduces nothing
    "tome": {"ratio": 0, "proportional": True, "feed_forward": True},
    "toma": {"ratio": 0},
    "ditfastattn": {"pattern": ["full"]},
    "flashmask": {"mask": "sliding_tiles", "reach": 64},
}
PAINTED: dict[str, dict[str, Any]] = {
    "tome 50 %": {"tome": {"ratio": 0.5}},
    "tome 50 %, proportional": {"tome": {"ratio": 0.5, "proportional": True}},
    "toma 50 %": {"toma": {"ratio": 0.5}},
    "shared over steps": {"ditfastattn": {"pattern": ["full", "reuse"]}},
    "shared over guidance": {"ditfastattn": {"pattern": ["full", "half"]}},
    "window": {"ditfastattn": {"pattern": ["full", "window"]}},
    "window and guidance": {"ditfastattn": {"pattern": ["full", "window_half"]}},
    "at_edm 39 %": {"at_edm": {"ratio": 0.6, "dense": 0.15, "stride": 1}},
}
OF_STACKS = ("at_edm",)  # which tiny, whose blocks stand alone, has not


@dataclass
class Job:
    """What a part needs to know."""

    bars: Bars
    quick: bool
    threads: int
    folder: Path

    @property
    def seconds(self) -> float:
        """For one comparison."""
        return 5 if self.quick else 60


def step(job: Job) -> None:
    """Every way at each size, in turns with dense attention."""
    sizes = {"unet": (32,) if job.quick else (64, 96), "joint": (32,) if job.quick else (64,)}
    for kind, sides in sizes.items():
        for side in sides:
            found = _compared(job, kind, side)
            if kind == "unet" and side == 64:
                _bars_of_step(job.bars, found)


def _compared(job: Job, kind: str, side: int) -> dict[str, dict[str, float]]:
    steps = {name: _step_of(kind, name, side) for name in WAYS}
    made = {name: one for name, one in steps.items() if one is not None}
    spans = {one.way.span for one in made.values()}
    dense = {span: made["dense"](span) for span in spans}
    found = {
        name: {"psnr": psnr(dense[one.way.span], one()), "gigaflop": flop_of(one) / 1e9}
        for name, one in made.items()
    }
    times = interleaved(dict(made), Clock("cpu", "wall"), job.seconds)
    for name, one in made.items():
        own = [seconds / one.way.span for seconds in times[name]]
        ratios = [slow / fast for slow, fast in zip(times["dense"], own, strict=True)]
        found[name] |= {"ms": 1e3 * median(own), "faster": median(ratios)}
        found[name]["flop_saved"] = 1 - found[name]["gigaflop"] / found["dense"]["gigaflop"]
        if not job.quick and side == 64:
            found[name]["peak_mb"] = peak_megabytes(kind, name, side)
        rounded = {key: float(f"{value:.4g}") for key, value in found[name].items()}
        job.bars.note(f"step/{kind}/{side}/{name}", rounded)
    return found


def _step_of(kind: str, name: str, side: int) -> ReducedStep | None:
    """None where a tool is not there, or a way is not for this network."""
    if name.startswith("tomesd") and importlib.util.find_spec("tomesd") is None:
        print("tomesd is not installed, and is left out: pip install tomesd", flush=True)
        return None
    text_among = kind == "joint" and name.startswith(("circle", "tiles", "shared", "tomesd"))
    return None if text_among else ReducedStep(kind, name, side)


def _bars_of_step(bars: Bars, found: dict[str, dict[str, float]]) -> None:
    bars.at_least("tome_50/faster_than_dense", found["tome 50 %"]["faster"], 1.5)
    bars.at_least(
        "toma_50/faster_than_tome", found["tome 50 %"]["ms"] / found["toma 50 %"]["ms"], 1.1
    )
    if other := found.get("tomesd 50 %"):
        near = [
            own["ms"]
            for name, own in found.items()
            if name.startswith("tome ") and own["psnr"] >= other["psnr"] - 0.05
        ]
        bars.at_least("tome/faster_than_tomesd_at_its_psnr", other["ms"] / min(near), 1.15)


def pictures(job: Job) -> None:
    """What shipped backbones sample with each, beside the dense pictures of the same seeds."""
    for backbone in ("tiny_dit",) if job.quick else ("tiny", "tiny_dit"):
        painter = Painter(backbone, 16 if job.quick else 200)
        dense = painter._paint(painter.original, painter.singles)
        trees = dict(PAINTED)
        if backbone == "tiny_dit":
            trees["plan"] = {"ditfastattn": {"plan": str(_plan(job))}}
        for name, tree in trees.items():
            if backbone == "tiny" and set(tree) & set(OF_STACKS):
                continue
            model = painter.fresh()
            apply_methods(model, methods_of(tree), trains=False)
            own = psnr(dense, painter._paint(model, painter.singles))
            job.bars.note(f"pictures/{backbone}/{name}/psnr", round(own, 2))
            bar = {"plan": 0.97, "at_edm 39 %": 0.95}.get(name)
            painter.report(job.bars, name, model, None if job.quick else bar)


def _plan(job: Job) -> Path:
    """The first of some thresholds that saves 40 % of attention."""
    for threshold in (0.4,) if job.quick else (0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        path = job.folder / f"plan-{threshold}.json"
        words = [f"methods.ditfastattn.threshold={threshold}", f"out={path}"]
        words += ["pictures=1", "preview.steps=25", "preview.guidance=5"]
        said = command("calibrate", "recipe=ditfastattn", *words, folder=job.folder,
                       cache=job.folder / "cache", threads=job.threads)  # fmt: skip
        print(said, flush=True)
        saved = 1 - json.loads(path.read_text())["attention_flop"]
        if saved >= 0.4:
            break
    job.bars.note("pictures/tiny_dit/plan/attention_flop_saved", round(saved, 4))
    job.bars.note("pictures/tiny_dit/plan/threshold", threshold)
    return path


def _heads(count: int, grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(3, 1, count, TOKENS, WIDTH, generator=generator)
    return [x.clone().requires_grad_(grad) for x in made]


def blocks(job: Job) -> None:
    """A quarter of the blocks of keys, at random, forward and backward over SDPA."""
    q, k, v = _heads(1, grad=True)

    def both(run: Callable[..., Tensor]) -> Callable[[], None]:
        def once() -> None:
            o = run(q, k, v)
            torch.autograd.grad(o, (q, k, v), torch.ones_like(o))

        return once

    calls = {"sdpa": both(sdpa)}
    for size in (64, 128, 256):
        count = TOKENS // size
        order = torch.rand(count, count, generator=torch.Generator().manual_seed(1)).argsort(-1)
        chosen = ChosenBlocks(order[None, :, : count // 4], size)
        calls[str(size)] = both(lambda q, k, v, chosen=chosen: block_sparse(q, k, v, chosen=chosen))
    times = interleaved(calls, Clock("cpu", "wall"), job.seconds)
    for name in list(calls)[1:]:
        ratios = [slow / fast for slow, fast in zip(times["sdpa"], times[name], strict=True)]
        job.bars.note(f"blocks/{name}/faster_than_sdpa", round(median(ratios), 3))
    job.bars.at_least("blocks/75_hidden/faster_than_sdpa", median(ratios), 3)


def sla(job: Job) -> None:
    """Forward at one critical block of keys in ten, over SDPA."""
    q, k, v = _heads(2, grad=False)
    calls: dict[str, Callable[[], None]] = {"sdpa": lambda: _drop(sdpa(q, k, v))}
    for size in (64, 128, 256):
        shares = Shares(size, 0.1, 0.1)
        calls[str(size)] = lambda shares=shares: _drop(sparse_and_linear(q, k, v, shares=shares))
    with torch.no_grad():
        times = interleaved(calls, Clock("cpu", "wall"), job.seconds)
    for name in list(calls)[1:]:
        ratios = [slow / fast for slow, fast in zip(times["sdpa"], times[name], strict=True)]
        job.bars.note(f"sla/{name}/faster_than_sdpa", round(median(ratios), 3))
    job.bars.at_least("sla/90_sparse/faster_than_sdpa", median(ratios), 5)


def _drop(_: object) -> None:
    """Frees what a call has made."""


def distilled(job: Job) -> None:
    """What recipe=sla makes of tiny_dit, judged."""
    if job.quick:
        return
    words = ["recipe=sla", "preview.every=0", "run.validate_every=0", "tracker=none"]
    cache = job.folder / "cache"
    printed = command("fit", *words, folder=job.folder, cache=cache, threads=job.threads)
    model = load_adapted(job.folder / printed.split()[-1] / "adapter.safetensors")[0]
    Painter("tiny_dit", 200).report(job.bars, "sla", model, 0.95)


def exact(job: Job) -> None:
    """Pictures bit for bit."""
    for backbone in ("tiny", "tiny_dit"):
        painter = Painter.__new__(Painter)
        painter.name = backbone
        trees = dict(NOTHING) | ({"at_edm": {"ratio": 0}} if backbone == "tiny_dit" else {})
        look = Sampling(steps=3, guidance=3)
        dense = sample(painter.fresh(), ["a fox"], [0], settings=look)
        for name, options in trees.items():
            model = painter.fresh()
            apply_methods(model, methods_of({name: options}), trains=False)
            same = torch.equal(sample(model, ["a fox"], [0], settings=look), dense)
            job.bars.exactly(f"exact/{backbone}/{name}", int(same), 1)


def tread(job: Job) -> None:
    """Wall time to the validation loss that plain training has after 2,000 steps."""
    if job.quick:
        return
    plain, routed = (_validated(job, recipe) for recipe in ("dit_scratch", "tread"))
    seconds, wanted = plain[-1]
    reached = next((time for time, loss in routed if loss <= wanted), None)
    job.bars.note("tread/plain", {"seconds": round(seconds), "loss": wanted})
    job.bars.note("tread/routed", {"seconds": round(routed[-1][0]), "loss": routed[-1][1]})
    if reached is None:
        job.bars.note("tread/reached", "the loss was not reached in 2,000 steps")
    job.bars.at_most("tread/time_to_loss", (reached or 10 * seconds) / seconds, 0.75)


def _validated(job: Job, recipe: str) -> list[tuple[float, float]]:
    """Seconds since the first step, as the run's own speed says, and the validation loss."""
    words = ["run.steps=2000", "run.validate_every=100", "preview.every=0", "tracker=none"]
    printed = command("fit", f"recipe={recipe}", *words, folder=job.folder,
                      cache=job.folder / "cache", threads=job.threads)  # fmt: skip
    lines = (job.folder / printed.split()[-1] / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    name, size = "train/images_per_second", load_recipe([f"recipe={recipe}"]).run.batch_size
    speed = median([row[name] for row in rows if row.get(name)]) / size
    return [(row["step"] / speed, row["val/loss"]) for row in rows if "val/loss" in row]


def draw(bars: Bars) -> None:
    """Time over PSNR of the steps in the result, one panel for each network and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, dict[str, dict[str, float]]] = {}
    for key, value in bars.found.items():
        part, _, rest = key.partition("/")
        if part == "step":
            group, _, name = rest.rpartition("/")
            groups.setdefault(group, {})[name] = value
    if not groups:
        return
    figure, axes = pyplot.subplots(1, len(groups), figsize=(6 * len(groups), 5), squeeze=False)
    for axis, (group, points) in zip(axes[0], groups.items(), strict=True):
        for name, point in points.items():
            if name != "dense":
                axis.scatter(point["faster"], point["psnr"])
                axis.annotate(name, (point["faster"], point["psnr"]), fontsize=7)
        axis.set(title=group, xlabel="times faster than dense", ylabel="PSNR to dense, dB")
    figure.tight_layout()
    figure.savefig(RESULTS / "reduction.png", dpi=100)


PARTS: dict[str, Callable[[Job], None]] = {
    "exact": exact,
    "blocks": blocks,
    "sla": sla,
    "step": step,
    "pictures": pictures,
    "distilled": distilled,
    "tread": tread,
}


def run_parts(job: Job, parts: Sequence[str]) -> None:
    for part in parts:
        PARTS[part](job)
        job.bars.write()
    if not job.quick:
        draw(job.bars)


def main() -> None:
    parser = parser_of(__doc__, list(PARTS), keeps=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    parts = chosen_of(options.only, list(PARTS), parser)
    torch.set_num_threads(options.threads)
    bars = Bars("reduction", options.quick, update=bool(options.only))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run_parts(Job(bars, options.quick, options.threads, folder.resolve()), parts)


if __name__ == "__main__":
    main()
