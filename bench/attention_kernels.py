"""Every attention kernel beside SDPA and the eager softmax: time, memory, growth, share of peak.

python bench/attention_kernels.py [--quick] [--device cuda] [--clock cpu] [--plots] [--only agent]

Kernels of one comparison take turns (A B A B); a figure is the median of the rounds with its
quartiles. Every memory figure is a process of its own. FLOP are those of the definition: what a
backward computes again does not count. `--clock cpu` counts processor time, for a machine that is
busy with other work: there wall time says what the others do. `--only` measures some kernels beside
SDPA, without the bars, and leaves the other figures of the result file as they are; `--plots` draws
that file again.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from _common import RESULTS, Bars, chosen_of, parser_of
from torch import Tensor

from trainer.kernels import flashmask, gated_linear
from trainer.kernels.agent_attention import agent_attention
from trainer.kernels.column_masks import sliding_window
from trainer.kernels.flash import observed
from trainer.kernels.linear_attention import (
    FEATURES,
    linear_attention,
    orthogonal_gaussian,
    random_features,
)
from trainer.kernels.mask_spec import MaskSpec
from trainer.kernels.softmax import eager, sdpa, softmax_attention
from trainer.kernels.tiled import tiled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGENTS, RANDOM = 20, 64  # one agent for so many tokens; so many random features
MASKED = ("flashmask", "sdpa_masked", "flex")
REMEMBERED = ("sdpa", "eager", "tiled", "linear_relu", "gla_chunked", "agent", "flashmask")
# the longest sequence that is measured: beyond it time (recurrent) or memory (the others) is short
LONGEST = {"recurrent": 4096, "eager": 16384, "sdpa_masked": 16384}


@dataclass(frozen=True)
class Case:
    """One comparison: q, k, v (1, heads, n, d); forward, or forward and backward."""

    n: int
    d: int
    heads: int
    dtype: str = "fp32"
    backward: bool = False
    device: str = "cpu"

    @property
    def label(self) -> str:
        mode = "forward_backward" if self.backward else "forward"
        return f"{mode}/{self.dtype}/d{self.d}/n{self.n}/h{self.heads}"


def kernels() -> list[str]:
    maps = [f"linear_{name}" for name in (*FEATURES, "random")]
    return [
        "sdpa",
        "eager",
        "tiled",
        *maps,
        "gla_chunked",
        "recurrent",
        "agent",
        *MASKED,
    ]


def kernel(name: str, case: Case) -> Callable[..., Tensor]:
    """From q, k, v and the gates to the output, with all that is prepared once already done."""
    if name.startswith("linear_"):
        kind = name.removeprefix("linear_")
        if kind == "random":
            features = random_features(orthogonal_gaussian(RANDOM, case.d, 0))
        else:
            features = FEATURES[kind]
        return lambda q, k, v, g: linear_attention(q, k, v, features)
    if name in MASKED:
        spec = window(case.n).to(torch.device(case.device))
        if name == "sdpa_masked":
            mask = spec.dense()
            return lambda q, k, v, g: sdpa(q, k, v, mask)
        run = flashmask.blockwise if name == "flashmask" else flashmask.flex
        return lambda q, k, v, g: run(q, k, v, spec)
    table: dict[str, Callable[..., Tensor]] = {
        "sdpa": lambda q, k, v, g: sdpa(q, k, v),
        "softmax_attention": lambda q, k, v, g: softmax_attention(q, k, v),
        "eager": lambda q, k, v, g: eager(q, k, v),
        "tiled": lambda q, k, v, g: tiled(q, k, v),
        "gla_chunked": lambda q, k, v, g: gated_linear.chunked(q, k, v, g),
        "recurrent": lambda q, k, v, g: gated_linear.recurrent(q, k, v, g),
        "agent": lambda q, k, v, g: agent_attention(q, agents(q), k, v),
    }
    return table[name]


def window(n: int) -> MaskSpec:
    """Of which three quarters of the blocks are hidden: n / 8 tokens to either side."""
    return sliding_window(n, n // 8, n // 8)


def agents(q: Tensor) -> Tensor:
    whole = q.shape[2] // AGENTS * AGENTS
    return q[:, :, :whole].unflatten(2, (-1, AGENTS)).mean(3)


def flop(name: str, case: Case) -> float:
    n, d = case.n, case.d
    side = n // 8
    pairs = n * (2 * side + 1) - side * (side + 1) if name in MASKED else n * n
    if name.startswith("linear_"):
        width = {"linear_cos": 2 * d, "linear_random": RANDOM}.get(name, d)
        one = 4.0 * n * d * width
    elif name in ("gla_chunked", "recurrent"):
        one = 5.0 * n * d * d
    elif name == "agent":
        one = 8.0 * n * (n // AGENTS) * d
    else:
        one = 4.0 * pairs * d
    return one * case.heads * (3 if case.backward else 1)


def chosen(case: Case) -> list[str]:
    """The kernels that can be measured here."""
    found = [name for name in kernels() if case.n <= LONGEST.get(name, case.n)]
    compiled = case.backward and case.dtype == "bf16" and case.n in (4096, 16384)
    if case.device == "cpu" or not compiled:  # a compilation for every shape
        found.remove("flex")
    if case.backward and "recurrent" in found and case.n > 1024:
        found.remove("recurrent")  # its graph holds a state for every token
    return found


def inputs(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.heads, case.n, case.d)
    q, k, v, g = (torch.randn(shape, generator=generator) for _ in range(4))
    g = torch.nn.functional.logsigmoid(g) / 16  # the gates of GLA
    made = [x.to(case.device, DTYPES[case.dtype]) for x in (q, k, v, g)]
    return [x.requires_grad_(case.backward) for x in made]


def call(name: str, case: Case, tensors: Sequence[Tensor]) -> Callable[[], None]:
    run = kernel(name, case)
    used = tensors if name in ("gla_chunked", "recurrent") else tensors[:3]

    def once() -> None:
        if not case.backward:
            with torch.no_grad():
                run(*tensors)
            return
        o = run(*tensors)
        torch.autograd.grad(o, used, torch.ones_like(o))

    return once


class Clock:
    """Seconds of a call; on CUDA until the device is done."""

    def __init__(self, device: str, kind: str) -> None:
        self.cuda = device == "cuda"
        self.now = time.process_time if kind == "cpu" else time.perf_counter

    def __call__(self, run: Callable[[], None], repeat: int = 1) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        begin = self.now()
        for _ in range(repeat):
            run()
        if self.cuda:
            torch.cuda.synchronize()
        return (self.now() - begin) / repeat


def interleaved(
    calls: dict[str, Callable[[], None]], clock: Clock, seconds: float
) -> dict[str, list[float]]:
    """Every round takes each call once, short ones often enough for the clock; 3 to 15 rounds, as
    `seconds` allow."""
    first = {}
    for name, run in calls.items():
        if clock.cuda:
            run()  # compiles, chooses algorithms
        first[name] = clock(run)
    repeats = {name: max(1, min(50, math.ceil(0.01 / max(t, 1e-6)))) for name, t in first.items()}
    cost = sum(first[name] * repeats[name] for name in calls)
    rounds = max(3, min(15, int(seconds / max(cost, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, run in calls.items():
            found[name].append(clock(run, repeats[name]))
    return found


class Bench:
    def __init__(self, bars: Bars, clock: Clock, seconds: float, device: str) -> None:
        self.bars, self.clock, self.seconds, self.device = bars, clock, seconds, device
        self.peaks: dict[str, float] = {}
        self.seen: dict[tuple[str, Case], float] = {}

    def peak(self, dtype: str) -> float:
        """FLOP/s of a large matrix product, the most this machine does."""
        if dtype not in self.peaks:
            size = 8192 if self.device == "cuda" else 1024
            a = torch.randn(size, size, device=self.device).to(DTYPES[dtype])
            times = [self.clock(lambda: _discard(a @ a), 3) for _ in range(5)]
            self.peaks[dtype] = 2 * size**3 / min(times)
            self.bars.note(f"peak_gflops/{dtype}", round(self.peaks[dtype] / 1e9, 1))
        return self.peaks[dtype]

    def compare(self, case: Case, names: Sequence[str]) -> dict[str, float]:
        """Seconds of each kernel, all noted with how much faster than SDPA they are and what share
        of the peak they reach."""
        peak, tensors = self.peak(case.dtype), inputs(case)
        times = interleaved(
            {name: call(name, case, tensors) for name in names}, self.clock, self.seconds
        )
        for name, own in times.items():
            low, middle, high = quantiles(own, n=4)
            figures = {
                "ms": 1e3 * middle,
                "low": 1e3 * low,
                "high": 1e3 * high,
                "of_peak": flop(name, case) / middle / peak,
                "rounds": len(own),
            }
            if "sdpa" in times:
                pairs = zip(times["sdpa"], own, strict=True)
                figures["over_sdpa"] = median(slow / fast for slow, fast in pairs)
            self.bars.note(
                f"{case.label}/{name}", {k: float(f"{v:.4g}") for k, v in figures.items()}
            )
            self.seen[name, case] = middle
        gc.collect()
        return {name: median(own) for name, own in times.items()}

    def memory(self, case: Case, name: str) -> float:
        """Bytes above what was held before, at the highest, in a fresh process."""
        words = [name, case.n, case.d, case.heads, case.dtype, int(case.backward), case.device]
        line = [sys.executable, __file__, "--memory", *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        found = float(done.stdout.split()[-1])
        self.bars.note(f"memory_mb/{case.label}/{name}", round(found / 2**20, 1))
        return found


def _discard(_: Tensor) -> None:
    return None


def measure_memory(words: Sequence[str]) -> float:
    """What `Bench.memory` runs. A small call before loads what is loaded once."""
    name, n, d, heads, dtype, backward, device = words
    case = Case(int(n), int(d), int(heads), dtype, backward == "1", device)
    small = replace(case, n=64)
    call(name, small, inputs(small))()
    run = call(name, case, inputs(case))
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest is from now on
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {key}; memory is measured on Linux only")


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Slope of log time over log n, least squares."""
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def cpu_bars(bench: Bench) -> None:
    bars = bench.bars
    at_4k = bench.compare(
        Case(4096, 40, 8), ["sdpa", "linear_relu", "gla_chunked", "recurrent", "agent"]
    )
    bars.at_least("linear_over_sdpa_4k", at_4k["sdpa"] / at_4k["linear_relu"], 10)
    bars.at_least("gla_over_sdpa_4k", at_4k["sdpa"] / at_4k["gla_chunked"], 4)
    bars.at_least("gla_over_recurrent_4k", at_4k["recurrent"] / at_4k["gla_chunked"], 4)
    bars.at_least("agent_over_sdpa_4k", at_4k["sdpa"] / at_4k["agent"], 3)
    q, k, v, g = inputs(Case(4096, 40, 1))
    error = (gated_linear.chunked(q, k, v, g) - gated_linear.recurrent(q, k, v, g)).abs().max()
    bars.at_most("gla_error", float(error), 1e-5)
    at_16k = bench.compare(Case(16384, 40, 1), ["sdpa", "linear_relu", "agent", "tiled"])
    bars.at_least("linear_over_sdpa_16k", at_16k["sdpa"] / at_16k["linear_relu"], 100)
    bars.at_least("agent_over_sdpa_16k", at_16k["sdpa"] / at_16k["agent"], 12)
    half = bench.compare(Case(16384, 40, 1, "bf16"), ["sdpa", "agent"])
    bars.at_least("agent_over_sdpa_16k_bf16", half["sdpa"] / half["agent"], 12)
    bars.at_most("tiled_over_sdpa_16k", at_16k["tiled"] / at_16k["sdpa"], 2)
    both = bench.compare(Case(4096, 40, 1, backward=True), ["sdpa", "tiled"])
    bars.at_most("tiled_over_sdpa_4k_forward_backward", both["tiled"] / both["sdpa"], 2)
    growth = [(n, bench.compare(Case(n, 40, 8), ["linear_relu"])["linear_relu"]) for n in LENGTHS]
    bars.at_most("linear_exponent", exponent(growth), 1.1)
    n = 8192
    bars.at_least("flashmask_hidden_blocks", window(n).sparsity(), 0.75)
    masked = bench.compare(Case(n, 64, 1, backward=True), ["sdpa_masked", "flashmask"])
    bars.at_least("flashmask_over_dense_8k", masked["sdpa_masked"] / masked["flashmask"], 2)
    bars.at_most("flashmask_bytes_a_key", window(n).nbytes / n, 16)
    case = Case(16384, 40, 1, backward=True)
    share = bench.memory(case, "tiled") / bench.memory(case, "eager")
    bars.at_most("tiled_memory_of_eager_16k", share, 0.05)
    for n, d, heads in ((8, 8, 12288), (64, 32, 192), (256, 16, 192)):  # of the tiny backbone
        bench.compare(Case(n, d, heads, "bf16", True), ["sdpa", "softmax_attention"])


LENGTHS = (1024, 4096, 16384)


def cuda_bars(bench: Bench) -> None:
    bars = bench.bars
    q, k, v, _ = inputs(Case(1024, 128, 8, "bf16", device="cuda"))
    bars.note("sdpa_chose", observed(q, k, v)[1])
    long = Case(4096, 64, 16, "bf16", True, "cuda")
    times = bench.compare(long, ["sdpa", "eager"])
    bars.at_least("sdpa_over_eager_4k_forward_backward", times["eager"] / times["sdpa"], 5)
    case = Case(8192, 128, 16, "bf16", device="cuda")
    sdpa_ = bench.compare(case, ["sdpa"])["sdpa"]
    bars.at_least("flash_of_peak_8k_forward", flop("sdpa", case) / sdpa_ / bench.peak("bf16"), 0.5)
    case = Case(16384, 128, 8, "bf16", True, "cuda")
    masked = bench.compare(case, ["sdpa", "sdpa_masked", "flex", "flashmask"])
    bars.at_least("flex_over_dense_16k", masked["sdpa_masked"] / masked["flex"], 1.65)
    at_16k = bench.compare(
        Case(16384, 64, 16, "bf16", device="cuda"), ["sdpa", "linear_relu", "agent", "gla_chunked"]
    )
    bars.note("linear_over_sdpa_16k", at_16k["sdpa"] / at_16k["linear_relu"])
    memory = Case(16384, 64, 4, "bf16", True, "cuda")
    share = bench.memory(memory, "tiled") / bench.memory(memory, "eager")
    bars.at_most("tiled_memory_of_eager_16k", share, 0.05)


def grid(quick: bool, device: str) -> Iterator[Case]:
    """What is measured beside the bars, shortest first."""
    if device == "cuda":
        for d, dtype in ((64, "bf16"), (128, "bf16"), (64, "fp32")):
            for n in (256, 1024, 4096, 16384, 65536):
                for backward in (False, True):
                    yield Case(n, d, 8 if n <= 4096 else 2, dtype, backward, device)
        return
    for n in (256, 1024) if quick else (256, 1024, 4096, 16384):
        for dtype in ("fp32",) if quick else ("fp32", "bf16"):
            for d in (40,) if quick else (32, 40, 64, 128):
                for backward in (False, True):
                    yield Case(n, d, 8 if n <= 4096 else 2, dtype, backward)
    if not quick:
        yield Case(65536, 64, 1)


def timed(bars: Bars, d: int, dtype: str, mode: str, name: str) -> list[tuple[int, float]]:
    """A kernel's (tokens, milliseconds a head) among the figures, by length; the last one taken of
    each."""
    found = {}
    for label, value in bars.found.items():
        parts = label.split("/")
        if (parts[0], parts[1:3], parts[-1]) == (mode, [dtype, f"d{d}"], name):
            n, heads = (int(part[1:]) for part in parts[3:5])
            found[n] = value["ms"] / heads
    return sorted(found.items())


def plots(bars: Bars) -> None:
    """Milliseconds a head over n, forward and forward with backward, as PNG: one a head size and
    dtype of which several lengths were measured."""
    try:
        import matplotlib as mpl
    except ImportError:
        bars.note("plots", "none; pip install matplotlib")
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(kernels(), pyplot.colormaps["tab20"].colors, strict=False))
    modes = ("forward", "forward_backward")
    shapes = {tuple(label.split("/")[2:4]) for label in bars.found if label.startswith("exponent/")}
    for dtype, size in sorted(shapes):
        d = int(size[1:])
        figure, axes = pyplot.subplots(1, 2, figsize=(15, 5), sharey=True, layout="constrained")
        for axis, mode in zip(axes, modes, strict=True):
            found = {name: timed(bars, d, dtype, mode, name) for name in kernels()}
            slowest = sorted(
                (n for n in found if len(found[n]) > 1), key=lambda n: -found[n][-1][1]
            )
            for name in slowest:
                label = f"{name}, n^{exponent(found[name]):.2f}"
                style = "--" if name.startswith("linear_") else "-"
                n, ms = zip(*found[name], strict=True)
                axis.loglog(
                    n, ms, style, marker="o", markersize=3, color=colours[name], label=label
                )
            axis.set_title(f"{mode.replace('_', ' and ')}, head size {d}, {dtype}")
            axis.set_xlabel("tokens")
            axis.set_ylabel("ms a head")
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        RESULTS.mkdir(exist_ok=True)
        figure.savefig(RESULTS / f"{bars.name}_d{d}_{dtype}.png", dpi=80)
        pyplot.close(figure)


def main() -> None:
    parser = parser_of(__doc__, kernels())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--plots", action="store_true", help="only draw the result file again")
    parser.add_argument("--memory", nargs=7, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.memory:
        print(measure_memory(options.memory))
        return
    name = "attention_kernels" + ("_cuda" if options.device == "cuda" else "")
    only = chosen_of(options.only, kernels(), parser)
    bars = Bars(name, options.quick, update=options.plots or bool(options.only))
    if options.plots:
        plots(bars)
        return
    bars.note("clock", options.clock)
    seconds = 0.3 if options.device == "cuda" else 1.0 if options.quick else 5.0
    bench = Bench(bars, Clock(options.device, options.clock), seconds, options.device)
    if not options.only:
        (cuda_bars if options.device == "cuda" else cpu_bars)(bench)
    for case in grid(options.quick, options.device):
        names = [name for name in chosen(case) if name == "sdpa" or name in only]
        if len(names) > 1:
            bench.compare(case, names)
    for name in kernels():
        for mode in (False, True):
            cases = [c for own, c in bench.seen if own == name and c.backward == mode]
            for d, dtype in sorted({(c.d, c.dtype) for c in cases}):
                points = [
                    (c.n, bench.seen[name, c] / c.heads)
                    for c in cases
                    if (c.d, c.dtype) == (d, dtype)
                ]
                if len({n for n, _ in points}) > 2:
                    label = f"exponent/{'forward_backward' if mode else 'forward'}/{dtype}/d{d}"
                    bars.note(f"{label}/{name}", round(exponent(points), 3))
    if not options.quick:
        memory_grid(bench, options.device, only)
        plots(bars)
    bars.write()


def memory_grid(bench: Bench, device: str, only: Sequence[str]) -> None:
    """Forward and backward of one head at growing lengths, for the kernels that are O(n) beside
    those that are not."""
    for dtype in ("fp32",) if device == "cuda" else ("fp32", "bf16"):
        for n in (4096, 16384):
            case = Case(n, 64, 1, dtype, True, device)
            for name in REMEMBERED:
                if name in only:
                    bench.memory(case, name)


if __name__ == "__main__":
    main()
