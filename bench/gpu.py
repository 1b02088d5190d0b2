"""Training steps of large models on one CUDA GPU, in less than nine minutes: random weights in the
geometry of SD 1.5, SDXL, SD 3.5 medium and FLUX.1.

    python bench/gpu.py                                # everything, as far as nine minutes go
    python bench/gpu.py --only steps --minutes 4       # steps alone
    python bench/gpu.py --quick                        # tiny networks, also on a CPU

- steps: LoRA, DoRA, QLoRA, selective and full, at 512 and 1024 pixels, batch 1 and 4: milliseconds,
  images a second, the most memory, and the share of this GPU's rate of plain bf16 products
- compile, checkpointing: LoRA with blocks compiled, and with blocks calculated again
- attention: forward and backward by each back end of PyTorch, and by kernels of ours

Frozen layers are in bf16, what trains in fp32, autocast is bf16, AdamW fused. FLOP are those that a
step really makes, counted by torch: of LoRA without gradients of frozen weights; QLoRA counts as
LoRA on the same layers. A case that does not fit in memory, or for which no time is left, is noted
as left out. The full run writes results/gpu.json.

Published figures to read these beside: peft's comparison of image generation (FLUX.2 klein base 4B,
L40S, 512 pixels, batch 2, bf16, 750 steps: LoRA of rank 32 takes 759 s and 10.7 GB, DoRA of rank 64
twice LoRA's time; github.com/huggingface/peft, method_comparison/image-gen); SimpleTuner's sweep on
an H100 (LoRA of SD 1.5 at 512 pixels: 0.181 s a step, 2.9 GiB; github.com/bghira/SimpleTuner).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from _common import Bars, chosen_of, parser_of
from _gpu_networks import GEOMETRIES, Geometry
from _networks import Network
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.attention.host import Host
from trainer.backbones.backbone import COMPILED_SHAPES
from trainer.backbones.held_layers import hold_layers
from trainer.config.load import methods_of
from trainer.kernels.linear_attention import relu_attention
from trainer.kernels.softmax import eager
from trainer.kernels.tiled import tiled
from trainer.methods.apply import apply_methods

PARTS = ("steps", "compile", "checkpointing", "attention")
SIXTEENTH = {"rank": 16, "sites": "all"}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {"lora": SIXTEENTH},
    "qlora": {"nf4": {"compute": "bf16"}, "lora": SIXTEENTH},
    "dora": {"dora": SIXTEENTH},
    "selective": {"selective": {}},
    "full": {"full": {}},
}
# of a model that has no room for its weights in fp32, which these calculate with or train
LARGE = ("lora", "qlora")
WARM, STEPS, SIDE = 3, 7, 4096
OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, torch.OutOfMemoryError)
# (batch, heads, tokens, head dim) of a layer of SD 1.5 and SDXL at 1024 pixels, and FLUX.1
ATTENTION = {"sd15": (1, 8, 16384, 40), "sdxl": (1, 10, 4096, 64), "flux": (1, 24, 4608, 128)}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
KERNELS: Mapping[str, Callable[..., Tensor]] = {
    "our_tiled": tiled, "our_eager": eager, "our_linear": relu_attention,
}  # fmt: skip


@dataclass
class Measurement:
    """device: where; until: when to begin nothing more, by `time.monotonic`; rate: of plain bf16
    products, FLOP a second; flops: of LoRA's steps by case."""

    bars: Bars
    device: torch.device
    until: float
    quick: bool
    rate: float = 0.0
    flops: dict[str, int] = field(default_factory=dict)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, what: Callable[[], Any], steps: int = STEPS) -> float:
        """Of one call, the median."""
        took = []
        for _ in range(2 if self.quick else steps):
            self.wait()
            began = time.perf_counter()
            what()
            self.wait()
            took.append(time.perf_counter() - began)
        return median(took)

    def case(self, name: str, what: Callable[[], Any]) -> None:
        """Notes what a case gives, or why it is left out."""
        if time.monotonic() > self.until:
            self.bars.note(name, "left out: no time is left")
            return
        try:
            found = what()
        except OUT_OF_MEMORY:
            found = "left out: it does not fit in this GPU's memory"
        except (RuntimeError, ValueError, NotImplementedError) as error:
            found = f"left out: {str(error).splitlines()[0][:200]}"
        self.bars.note(name, found)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_rate(own: Measurement) -> float:
    """FLOP a second of a large product in bf16, the most that a step could reach."""
    side = 128 if own.quick else 2 * SIDE
    a = torch.randn(side, side, device=own.device, dtype=torch.bfloat16)
    a @ a
    return 2 * side**3 / own.seconds(lambda: a @ a)


class Training:
    """Steps of one method on a network of random weights, the same batch every time."""

    def __init__(self, geometry: Geometry, method: str, *, side: int, rows: int, own: Measurement):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if geometry.large else torch.float32
        with torch.device(own.device), _default(dtype):
            denoiser = geometry.make()
        Host.attach(denoiser, geometry.traits)
        self.network = Network(denoiser, geometry.part)
        plan = apply_methods(self.network, methods_of(METHODS[method]), 0)  # type: ignore[arg-type]
        self.network.to(own.device)
        trained = {name: self.network.get_parameter(name) for name in plan.names}
        hold_layers(denoiser, torch.bfloat16, {id(value) for value in trained.values()})
        self.inputs = geometry.inputs(rows, side, own.device)
        self.trained, self.device = list(trained.values()), own.device
        fused = own.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=fused)
        denoiser.train()

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.network.denoiser(**self.inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def facts(step: Training, own: Measurement, key: str, method: str, rows: int) -> dict[str, float]:
    """What a step costs, after it was warmed."""
    for _ in range(WARM):
        step()
    if own.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(own.device)
    took = own.seconds(step)
    found = {"ms": 1000 * took, "images_per_second": rows / took}
    if own.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(own.device) / 2**30
    if method != "qlora":
        with FlopCounterMode(display=False) as counter:
            step()
        own.flops[f"{key}_{method}"] = counter.get_total_flops()
    flops = own.flops.get(f"{key}_{'lora' if method == 'qlora' else method}")
    if flops:
        found |= {"tflop": flops / 1e12, "of_product_rate": flops / took / own.rate}
    return found


def steps(own: Measurement) -> None:
    sizes = ((64, 2),) if own.quick else ((512, 4), (1024, 1))
    for side, rows in sizes:
        for name, geometry in _geometries(own).items():
            for method in METHODS:
                if geometry.large and method not in LARGE:
                    continue

                def run(g: Geometry = geometry, m: str = method, s: int = side, r: int = rows,
                        key: str = f"{name}_{side}") -> Any:  # fmt: skip
                    return facts(Training(g, m, side=s, rows=r, own=own), own, key, m, r)

                own.case(f"step_{name}_{side}_{method}", run)


def compiling(own: Measurement) -> None:
    side, rows = (64, 2) if own.quick else (1024, 1)
    for name, geometry in _geometries(own).items():

        def run(g: Geometry = geometry, key: str = f"{name}_{side}") -> Any:
            step = Training(g, "lora", side=side, rows=rows, own=own)
            plain = facts(step, own, key, "lora", rows)
            blocks = g.blocks(step.network.denoiser)
            dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_SHAPES * len(blocks))
            for block in blocks:
                block.compile(dynamic=False, **({"backend": "aot_eager"} if own.quick else {}))
            own.wait()
            began = time.perf_counter()
            step()
            own.wait()
            first = time.perf_counter() - began
            for _ in range(WARM):
                step()
            return {"off_ms": plain["ms"], "on_ms": 1000 * own.seconds(step), "first_s": first}

        own.case(f"compile_{name}_{side}", run)


def checkpointing(own: Measurement) -> None:
    side, rows = (64, 2) if own.quick else (1024, 1)
    for name, geometry in _geometries(own).items():

        def run(g: Geometry = geometry, key: str = f"{name}_{side}") -> Any:
            step = Training(g, "lora", side=side, rows=rows, own=own)
            step.network.denoiser.enable_gradient_checkpointing()
            return facts(step, own, key, "lora", rows)

        own.case(f"checkpointing_{name}_{side}", run)


def attention(own: Measurement) -> None:
    """Milliseconds of a forward and its backward."""
    shapes = {"tiny": (1, 2, 64, 16)} if own.quick else ATTENTION
    for name, shape in shapes.items():
        q, k, v = (
            torch.randn(shape, device=own.device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )

        def both(kernel: Callable[..., Tensor], q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            def run() -> None:
                kernel(q, k, v).float().sum().backward()

            run()
            return {"ms": 1000 * own.seconds(run)}

        for backend, chosen in BACKENDS.items():

            def of_torch(b: SDPBackend = chosen) -> Any:
                with sdpa_kernel(b):
                    return both(nn.functional.scaled_dot_product_attention)

            own.case(f"attention_{name}_{backend}", of_torch)
        for kind, kernel in KERNELS.items():
            own.case(f"attention_{name}_{kind}", lambda kernel=kernel: both(kernel))


def _geometries(own: Measurement) -> Mapping[str, Geometry]:
    return {name: each for name, each in GEOMETRIES.items() if each.tiny == own.quick}


RUN: Mapping[str, Callable[[Measurement], None]] = {
    "steps": steps, "compile": compiling, "checkpointing": checkpointing, "attention": attention,
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, PARTS)
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing after so many")
    options = parser.parse_args(words)
    chosen = chosen_of(options.only, PARTS, parser)
    if not (options.quick or torch.cuda.is_available()):
        parser.error("torch finds no CUDA GPU here; --quick runs tiny networks on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bars = Bars("gpu", options.quick, update=True)
    bars.note_when()
    until = time.monotonic() + 60 * options.minutes
    own = Measurement(bars, device, until, options.quick)
    if device.type == "cuda":
        bars.note("gpu", torch.cuda.get_device_name(device))
    own.rate = measure_rate(own)
    bars.note("product_tflops", own.rate / 1e12)
    for name in chosen:
        RUN[name](own)
    bars.write()


if __name__ == "__main__":
    main()
