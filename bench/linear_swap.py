"""Self-attention swapped in trained models: what is left of what they paint, and what a step saves.

    python bench/linear_swap.py --keep ./kept
    python bench/linear_swap.py --only swap,agents --backbones tiny_dit
    python bench/linear_swap.py --quick

The parts are `PARTS`. With --only or --backbones the other figures stay as they are in the result
file. Accuracy is `bench/tiny_backbone.py`'s: the same prompts, seeds and judge for the original and
the swapped model. Quick: fewer pictures and steps, small latents, in five minutes on two cores; it
judges no training and writes nothing. Further words go to every `fit`.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from _common import Bars, chosen_of, command, parser_of
from _networks import SD15, Network
from _runs import PLAIN
from attention_kernels import Clock, interleaved
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_backbone import SEED, one, two
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.attention.condition import Condition
from trainer.backbones import load_backbone
from trainer.config import load
from trainer.config.lineage import backbone_spec
from trainer.data.world.scenes import Scene, draw_scene
from trainer.data.world.sprites import KNOWN
from trainer.diffusion.sampler import sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.judge import Judge
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted

NAMES = ("tiny", "tiny_dit")
LOOK = Sampling(steps=25, guidance=5.0)
MINUTES = 10  # of training, all included
HEADS = 2  # of 8, in the narrowed geometry
SIDES = {False: (16, 32, 64, 96, 128), True: (64, 128)}  # of latents, by whether a step trains
QUICK_SIDES = {False: (16, 32, 64), True: (32,)}


class Painter:
    """Paints the same scenes with any model of one backbone, and has them judged."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.original = self.fresh()
        self.judge = Judge(self.original.folder / "clip")
        relations = ("left of", "above")
        self.singles = [draw_scene(SEED + 2, i, KNOWN, count=1) for i in range(count)]
        self.pairs = [
            draw_scene(SEED + 1, i, KNOWN, count=2, relation=relations[i % 2]) for i in range(count)
        ]
        self.expected = self.scores(self.original)

    def fresh(self) -> Any:
        loaded = load_backbone(backbone_spec(self.name), self.name)
        return loaded.eval().requires_grad_(False)

    def scores(self, model: Any) -> dict[str, float]:
        """Shares of pictures with the one sprite right, with both of two, and of these with the
        stated relation."""
        alone = one(self.judge, self._paint(model, self.singles), self.singles)
        both, placed = two(self.judge, self._paint(model, self.pairs), self.pairs)
        return {"one": alone, "two_both": both, "two_relation": placed}

    def _paint(self, model: Any, scenes: Sequence[Scene]) -> Tensor:
        prompts = [scene.caption for scene in scenes]
        return sample_many(model, prompts, range(len(prompts)), settings=LOOK, batch_size=50)

    def report(self, bars: Bars, name: str, model: Any, bar: float | None) -> None:
        """Accuracy over the original's, with a bar where one is given; the rest for reading."""
        found = self.scores(model)
        ratios = {key: found[key] / value for key, value in self.expected.items() if value}
        if bar is not None:
            bars.at_least(f"{self.name}/{name}/accuracy_over_original", ratios["one"], bar)
        table = {"original": self.expected, "swapped": found, "ratio": ratios}
        bars.note(
            f"{self.name}/{name}",
            {
                **table,
                "pictures": len(self.singles),
                "steps": LOOK.steps,
                "guidance": LOOK.guidance,
            },
        )


@dataclass
class Job:
    """What a part needs to know. words: of the user's, for every `fit`."""

    bars: Bars
    folder: Path
    names: Sequence[str]
    count: int
    threads: int
    words: Sequence[str]
    sides: dict[bool, tuple[int, ...]]
    seconds: float
    heads: int = HEADS
    painters: dict[str, Painter] = field(default_factory=dict)

    def each(self) -> list[Painter]:
        """The painters of the backbones; the original is judged once for all parts."""
        for name in self.names:
            if name not in self.painters:
                self.painters[name] = Painter(name, self.count)
        return [self.painters[name] for name in self.names]

    def trained(self, chosen: str, name: str, own: Sequence[str] = (), *, part: str = "") -> Any:
        """The model that a recipe, with the words `own`, makes of a backbone; the time it takes has
        a bar, called after the `part`, the recipe's name if not given."""
        words = [f"recipe={chosen}", f"backbone={name}", "run.accelerator=cpu", *PLAIN]
        words += [*own, *self.words]
        given = list({word.partition("=")[0]: word for word in words}.values())
        begin = time.monotonic()
        printed = command(
            "fit", *given, folder=self.folder, cache=self.folder / "cache", threads=self.threads
        )
        minutes = (time.monotonic() - begin) / 60
        label = f"{name}/{part or chosen}/minutes_all_included"
        if self.bars.quick:
            self.bars.note(label, round(minutes, 2))
        else:
            self.bars.at_most(label, minutes, MINUTES)
        return load_adapted(self.folder / printed.split()[-1] / "adapter.safetensors")[0]


class Off:
    """An op: nothing comes out of attention but the bias of its output layer."""

    name = "off"

    def output(self, o: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(o)


def floors(job: Job) -> None:
    """What the swaps are to be read against: linear without any training, and self-attention off.
    Where these keep the accuracy, it says little of a swap."""
    for painter in job.each():
        model = painter.fresh()
        load.methods_of({"linear_attention": {}})["linear_attention"].apply(model)
        painter.report(job.bars, "linear_untrained", model, None)
        model = painter.fresh()
        model.host.install(Off(), [site for site in model.sites if site.kind == "self"])
        painter.report(job.bars, "self_attention_off", model, None)


def swap(job: Job) -> None:
    """All self-attention linear, distilled and fine-tuned."""
    for painter in job.each():
        model = job.trained("linear_swap", painter.name)
        painter.report(job.bars, "linear_swap", model, None if job.bars.quick else 0.95)


def agents(job: Job) -> None:
    """AgentSD without training, and its merged tokens with too many agents for them to be used."""
    for painter in job.each():
        for name, ratio, bar in (("agent_sd", 0.95, 0.9), ("agent_sd_without_agents", 0.1, None)):
            model = painter.fresh()
            tree = {"agent_attention": {"agents": "merged", "ratio": ratio}}
            load.methods_of(tree)["agent_attention"].apply(model)
            painter.report(job.bars, name, model, bar)


def tuned(job: Job) -> None:
    """Agent attention with pooled agents, distilled and fine-tuned."""
    for painter in job.each():
        model = job.trained("agent_attention", painter.name)
        painter.report(job.bars, "agent_attention_tuned", model, None)


def soft(job: Job) -> None:
    """SOFT in place of softmax self-attention, distilled and fine-tuned as `linear_swap`."""
    for painter in job.each():
        own = [
            "methods.linear_attention=null",
            "methods.soft={ratio: 2, distill: 1, distill_until: 0.5}",
        ]
        model = job.trained("linear_swap", painter.name, own, part="soft")
        painter.report(job.bars, "soft", model, None)


def geometry(heads: int) -> dict[str, Any]:
    """The blocks of Stable Diffusion 1.5 with `heads` of its 8 heads of the same sizes, and as
    many fewer channels."""
    return SD15 | {
        "block_out_channels": tuple(width * heads // 8 for width in SD15["block_out_channels"]),
        "cross_attention_dim": SD15["cross_attention_dim"] * heads // 8,
        "attention_head_dim": heads,  # diffusers' name for their number, in this family
        "norm_num_groups": min(32, 8 * heads),
    }


class Step:
    """One step of a network with random weights on one latent of this side: of sampling without
    guidance, a forward; of training, forward, backward and AdamW on all weights."""

    def __init__(self, network: Network, side: int, trains: bool) -> None:
        self.network, self.trains = network, trains
        generator = torch.Generator().manual_seed(0)
        width = network.denoiser.config.cross_attention_dim
        self.x_t, self.target = torch.randn(2, 1, 4, side, side, generator=generator)
        self.condition = Condition(torch.randn(1, 77, width, generator=generator))
        network.requires_grad_(trains)
        self.optimizer = torch.optim.AdamW(network.parameters()) if trains else None

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.trains):
            output = self.network.predict(self.x_t, torch.tensor([500]), self.condition)
        if self.optimizer is not None:
            (output - self.target).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def networks(heads: int) -> dict[str, Network]:
    """The same weights twice: with softmax attention by SDPA, and with self-attention linear."""
    torch.manual_seed(0)
    plain = Network(UNet2DConditionModel(**geometry(heads)), "unet")
    linear = copy.deepcopy(plain)
    apply_methods(linear, load.methods_of({"linear_attention": {"sites": "self"}, "full": {}}))
    assert len(plain.host.sites) == len(linear.host.sites)
    return {"softmax": plain, "linear": linear}


def steps(job: Job) -> None:
    """Time of a step with linear attention against the same with softmax attention, in turns."""
    bars, made = job.bars, networks(job.heads)
    bars.note("steps/channels", geometry(job.heads)["block_out_channels"])
    for trains, kind in ((False, "sampling"), (True, "training")):
        points = []
        for side in job.sides[trains]:
            calls: dict[str, Callable[[], None]] = {
                name: Step(network, side, trains) for name, network in made.items()
            }
            for name in calls if side == min(job.sides[trains]) else ():
                calls[name]()  # what is set up once
            times = interleaved(calls, Clock("cpu", "wall"), job.seconds)
            ratios = [a / b for a, b in zip(times["softmax"], times["linear"], strict=True)]
            low, middle, high = quantiles(ratios, n=4, method="inclusive")
            found = {"faster": middle, "low": low, "high": high, "rounds": len(ratios)}
            found |= {f"{name}_ms": 1e3 * median(own) for name, own in times.items()}
            found |= {
                f"attention_of_flop_{label}": attention_share(heads, side)
                for label, heads in (("here", job.heads), ("sd15", 8))
            }
            bars.note(f"{kind}/{side}", {k: float(f"{v:.4g}") for k, v in found.items()})
            if side == 128:
                bars.at_least(f"{kind}/{side}/linear_faster", middle, 2)
            points.append((side, middle))
        bars.note(f"{kind}/crossover", crossover(points))


@cache
def attention_share(heads: int, side: int) -> float:
    """The share of a forward's FLOP that q k^T and its product with v have in self-attention: fewer
    channels make it larger than in the whole model, since convolutions grow with their square."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = Network(UNet2DConditionModel(**geometry(heads)), "unet")
        network.unet.set_attn_processor(AttnProcessor())  # plain products, which are counted
        text = torch.zeros(1, 77, network.unet.config.cross_attention_dim)
        condition = Condition(text)
        network.predict(torch.zeros(1, 4, side, side), torch.zeros(1), condition)
    attention = 0
    for site in network.sites:
        if site.kind == "self" and site.divisor is not None:
            attention += 4 * (side // site.divisor) ** 4 * site.heads * site.head_dim
    return attention / counter.get_total_flops()


def crossover(points: Sequence[tuple[int, float]]) -> str | float:
    """The side from which on linear attention is the faster one, between two measured ones by a
    straight line in logarithms."""
    slower = [place for place, (_, ratio) in enumerate(points) if ratio < 1]
    if not slower:
        return f"below {points[0][0]}"
    if slower[-1] == len(points) - 1:
        return f"above {points[-1][0]}"
    (side, ratio), (next_side, next_ratio) = points[slower[-1] : slower[-1] + 2]
    share = -math.log(ratio) / (math.log(next_ratio) - math.log(ratio))
    return round(side * (next_side / side) ** share, 1)


PARTS: dict[str, Callable[[Job], None]] = {
    "steps": steps,
    "floors": floors,
    "agents": agents,
    "swap": swap,
    "tuned": tuned,
    "soft": soft,
}


def main() -> None:
    parser = parser_of(__doc__, list(PARTS), keeps=True, words=True)
    parser.add_argument("--backbones", default="", help=f"of {','.join(NAMES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pictures", type=int, help="of either kind for a model, instead of 200")
    parser.add_argument("--heads", type=int, default=HEADS, help="of 8, of the narrowed geometry")
    parser.add_argument("--sides", help="of latents, for the steps, as in 16,32")
    options = parser.parse_args()
    quick = options.quick
    parts = chosen_of(options.only, list(PARTS), parser)
    names = chosen_of(options.backbones, list(NAMES), parser)
    torch.set_num_threads(options.threads)
    sides = QUICK_SIDES if quick else SIDES
    if options.sides:
        asked = tuple(int(side) for side in options.sides.split(","))
        sides = {False: asked, True: asked}
    bars = Bars("linear_swap", quick, update=bool(options.only or options.backbones))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(
            bars=bars,
            folder=folder.resolve(),
            names=names,
            count=options.pictures or (32 if quick else 200),
            threads=options.threads,
            words=(*(("run.steps=20",) if quick else ()), *options.words),
            sides=sides,
            seconds=5.0 if quick else 90.0,
            heads=options.heads,
        )
        for part in parts:
            PARTS[part](job)
            bars.write()


if __name__ == "__main__":
    main()
