"""The feature level for clips, measured: what attention across frames costs.

    python bench/video.py
    python bench/video.py --only sparse_causal --clock cpu
    python bench/video.py --quick

The parts are `PARTS`. With --only the figures of the other parts stay as they are in the result
file. What is compared takes turns (A B A B); a figure is the median of the rounds. `--clock cpu`
counts processor time, for a machine that is busy with other work. Quick: short rounds, writes
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from _common import Bars, chosen_of
from attention_kernels import Clock, interleaved
from diffusers.models.attention_processor import Attention
from torch import Tensor

from trainer.attention.frames import gathered
from trainer.attention.kernels import sdpa
from trainer.attention.temporal import lines, unlines

FRAMES = 16
HEADS, HEAD_DIM = 8, 40  # as in SD 1.5 where it has most tokens
SPARSE = ("first", "previous")


@dataclass(frozen=True)
class Timer:
    clock: Clock
    seconds: float

    def __call__(self, **calls: Callable[[], Any]) -> dict[str, float]:
        """Seconds of each."""
        found = interleaved(calls, self.clock, self.seconds)
        return {name: median(rounds) for name, rounds in found.items()}


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * value for name, value in seconds.items()}


def heads(rows: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, HEADS, tokens, HEAD_DIM)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def reading(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Self-attention of frames to the first and the previous one, its gathering included."""
    return sdpa(q, gathered(k, FRAMES, SPARSE), gathered(v, FRAMES, SPARSE))


def sparse_causal(bars: Bars, timer: Timer) -> None:
    """Tune-A-Video's self-attention beside that between all tokens of all frames, and beside that
    of each frame by itself."""
    for tokens in (64, 256) if bars.quick else (64, 256, 1024):
        q, k, v = heads(FRAMES, tokens)
        whole = [x.transpose(0, 1).flatten(1, 2)[None].contiguous() for x in (q, k, v)]
        seconds = timer(
            full=partial(sdpa, *whole), sparse=partial(reading, q, k, v), own=partial(sdpa, q, k, v)
        )
        faster = seconds["full"] / seconds["sparse"]
        if tokens == 256:
            bars.at_least("sparse_causal_faster", faster, 4)
        bars.note(
            f"sparse_causal_{tokens}",
            {
                "faster": faster,
                "over_own_frame": seconds["sparse"] / seconds["own"],
                **milliseconds(seconds),
            },
        )


class Layers:
    """A spatial and a temporal attention layer of one width, projections and all."""

    def __init__(self) -> None:
        width = HEADS * HEAD_DIM
        self.spatial, self.temporal = (
            Attention(query_dim=width, heads=HEADS, dim_head=HEAD_DIM) for _ in range(2)
        )

    @torch.no_grad()
    def through_space(self, x: Tensor) -> Tensor:
        return self.spatial(x)

    @torch.no_grad()
    def through_time(self, x: Tensor) -> Tensor:
        return unlines(self.temporal(lines(x, FRAMES)), x)


def temporal_cost(bars: Bars, timer: Timer) -> None:
    """Attention over the frames of each pixel beside that over the pixels of each frame: softmax
    attention by itself, and whole layers, whose projections cost both the same."""
    torch.manual_seed(0)
    layers = Layers()
    for tokens in (256, 1024):
        space, time = heads(FRAMES, tokens), heads(tokens, FRAMES)
        x = torch.randn(FRAMES, tokens, HEADS * HEAD_DIM)
        seconds = timer(
            space=partial(sdpa, *space),
            time=partial(sdpa, *time),
            space_layer=partial(layers.through_space, x),
            time_layer=partial(layers.through_time, x),
        )
        share = seconds["time"] / seconds["space"]
        if tokens == 1024:
            bars.at_most("temporal_cost", share, 0.2)
        bars.note(
            f"temporal_cost_{tokens}",
            {
                "share": share,
                "share_of_layer": seconds["time_layer"] / seconds["space_layer"],
                **milliseconds(seconds),
            },
        )


PARTS: dict[str, Callable[[Bars, Timer], None]] = {
    "sparse_causal": sparse_causal,
    "temporal_cost": temporal_cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short rounds, no result file")
    parser.add_argument("--only", default="", help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    chosen = chosen_of(options.only, list(PARTS), parser)
    bars = Bars("video", options.quick, update=bool(options.only))
    timer = Timer(Clock("cpu", options.clock), 2 if options.quick else 20)
    for part in chosen:
        PARTS[part](bars, timer)
        bars.write()


if __name__ == "__main__":
    main()
