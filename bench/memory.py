"""The memory that training takes, measured beside the estimate that `check plan=true` prints.

    python bench/memory.py                          # SDXL: 10 GB of disk and of memory
    python bench/memory.py --only sdxl_512          # at 512 pixels alone, in a quarter of the time
    python bench/memory.py --only narrow_1024       # a narrow SDXL: 3 GB, two minutes
    python bench/memory.py --only sana_1600m_1024,pixart_sigma_1024,sd35_medium_512
    python bench/memory.py --quick                  # the shipped backbone

Each is the published network, its layers in bf16, with random weights that are stored in bf16 in a
temporary folder: LoRA on all attention, batch 1, gradient checkpointing, two steps on the CPU in a
process of its own, on latents that are noise, since a run encodes its pictures before its first
step. SD 3.5 medium is without its third text encoder, as many have it. Measured: the most memory
that is resident during the steps, and while the weights are loaded, each less what the program
takes before (Linux alone tells it), which is after a step of the shipped backbone, when all
libraries are there. The weights are mapped from files; pages of them that were only read to be
copied into fp32 are let go before the steps, as the system does where memory is short. It refuses
to begin where less is free than the estimate and 2 GB.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import Bars, chosen_of, parser_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
LAYOUTS = ROOT / "data" / "layouts"
# SDXL with half the channels, a transformer layer in each block, and text encoders of two layers
NARROW: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [160, 320, 640],
        "transformer_layers_per_block": [1, 1, 1],
    },
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
}
# SD 1.5 with less than a third of the channels and a small VAE, which bench/peers.py trains
NARROW_SD: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [96, 192, 384, 384]},
    "text_encoder": {"num_hidden_layers": 2},
    "vae": {"block_out_channels": [32, 64, 64, 64]},
}
CHANGED = {"narrow_1024": NARROW, "narrow_sd15": NARROW_SD}
LEFT_OUT = {"sd35_medium_512": ("text_encoder_3", "tokenizer_3")}
# the layout, None for the backbone that ships, and the side of the pictures in pixels
CASES: dict[str, tuple[str | None, int]] = {
    "sdxl_1024": ("sdxl", 1024),
    "sdxl_512": ("sdxl", 512),
    "narrow_1024": ("sdxl", 1024),
    "narrow_sd15": ("sd15", 256),
    "sana_1600m_1024": ("sana_1600m", 1024),
    "pixart_sigma_1024": ("pixart_sigma", 1024),
    "sd35_medium_512": ("sd35_medium", 512),
    "tiny": (None, 64),
}
PARTS, QUICK = ("sdxl_512", "sdxl_1024"), ("tiny",)
BLOCK = 2**20  # random values, of which weights are made again and again
SPARE = 2 * 10**9  # bytes that others keep
STEPS = 2
MADV_DONTNEED = 4


def words_of(name: str, folder: str) -> list[str]:
    _, side = CASES[name]
    own = [f"backbone={folder}", f"run.resolution={side}", "run.batch_size=1"]
    own += ["recipe=lora", "data.concept=sprite:penguin", "data.prior_weight=0", "data.token=sks"]
    own += ["methods.new_token=null", "methods.lora.sites=all", "run.gradient_checkpointing=true"]
    return [*own, "run.precision=bf16", "run.device=cpu", "optim.ema=null"]


def make_folder(name: str, where: str) -> None:
    """The pipeline of a case with random weights in bf16, and tokenizers that know letters or the
    words of the small backbone."""
    from safetensors.torch import save_file

    from trainer.backbones.pipeline_folder import without_values
    from trainer.backbones.spec import BackboneSpec
    from trainer.config.lineage import backbone_spec
    from trainer.runs.adapter import load_base

    layout = str(CASES[name][0])
    folder = Path(shutil.copytree(LAYOUTS / layout, where))
    for part, changes in CHANGED.get(name, {}).items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    _leave_out(folder, LEFT_OUT.get(name, ()))
    for tokenizer in folder.glob("tokenizer*"):
        _make_tokenizer(tokenizer)
    with without_values():
        spec = BackboneSpec(folder=where, family=backbone_spec(layout).family)
        model = load_base(spec, name, hold=False)
    block = (0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))).bfloat16()
    parts = {model.denoiser_name: model.denoiser, **model.text_encoders, "vae": model.vae}
    for part, module in parts.items():
        tensors = {name: _filled(block, value) for name, value in module.state_dict().items()}
        ours = part in (model.denoiser_name, "vae")
        file = "diffusion_pytorch_model.safetensors" if ours else "model.safetensors"
        save_file(tensors, folder / part / file, {"format": "pt"})


def _leave_out(folder: Path, parts: tuple[str, ...]) -> None:
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    for part in parts:
        shutil.rmtree(folder / part)
        content[part] = [None, None]
    index.write_text(json.dumps(content))


def _make_tokenizer(folder: Path) -> None:
    from pixart_folder import t5_tokenizer

    kind = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    if kind.startswith("T5"):
        t5_tokenizer().save_pretrained(folder)
    else:
        shutil.copytree(ROOT / "data" / "tiny" / "tokenizer", folder, dirs_exist_ok=True)


def _filled(block: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value.contiguous()
    times = -(-value.numel() // len(block))
    return block.repeat(times)[: value.numel()].reshape(value.shape).contiguous()


def estimated(words: list[str]) -> dict[str, int]:
    """What `check plan=true` says of a recipe."""
    from trainer.backbones.device import choose_placement
    from trainer.config.load import load_recipe
    from trainer.training.memory_estimate import memory_of
    from trainer.training.without_weights import planned

    recipe = load_recipe(words)
    backbone, plan = planned(recipe, choose_placement("cpu", recipe.run.precision))
    found = memory_of(recipe, backbone, plan)
    return {"peak": found.peak, "loading": found.loading}


def resident(what: str) -> int:
    """Bytes, by the system: VmRSS are now resident, VmHWM at most since `forget`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {what}")


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def let_go_of_files() -> None:
    """Pages of weight files are not resident until they are read again."""
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            first, last = (int(place, 16) for place in line.split()[0].split("-"))
            assert advise(first, last - first, MADV_DONTNEED) == 0


def train(words: list[str], most: int) -> dict[str, Any]:
    """Two steps in this process, which gets no more than `most` bytes."""
    from trainer.common.freed_memory import return_freed_memory

    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    Path("/proc/self/oom_score_adj").write_text("1000")  # before others, if memory runs out
    return_freed_memory()  # as `fit` does
    steps_of(words_of("tiny", "tiny"), 0)
    before = resident("VmRSS")
    forget()
    found = steps_of(words, before)
    return {"peak": resident("VmHWM") - before, **found}


def steps_of(words: list[str], before: int) -> dict[str, Any]:
    """before: bytes that were resident before the weights are loaded."""
    from trainer.backbones.device import choose_placement
    from trainer.config.load import load_recipe
    from trainer.data.loader import Batch
    from trainer.runs.adapter import load_base
    from trainer.training.build import adapt, module_of

    recipe = load_recipe(words)
    placement = choose_placement("cpu", recipe.run.precision)
    base = load_base(recipe.backbone, "measured", placement, hold=False, read_held=True)
    plan = adapt(recipe, base, placement)
    loading = resident("VmHWM") - before
    module = module_of(recipe, base, plan)
    optimizer = module.configure_optimizers()["optimizer"]
    side = recipe.run.resolution // base.divisor
    moments = torch.randn(1, 2 * base.latent_channels, side, side)
    batch = Batch(0, [0], ["a photo of sks"], ["noise"], torch.ones(1), moments=moments)
    let_go_of_files()
    forget()
    seconds = []
    for _ in range(STEPS):
        began = time.monotonic()
        optimizer.zero_grad()
        loss = module.task.loss(module.task.encode(batch)).losses.mean()
        loss.backward()
        optimizer.step()
        seconds.append(round(time.monotonic() - began, 1))
    return {"loading": loading, "seconds": seconds, "loss": float(loss.detach())}


def measure(bars: Bars, name: str, scratch: Path) -> None:
    layout, _ = CASES[name]
    made = name if name in CHANGED else layout
    folder = ROOT / "data" / "tiny" if made is None else scratch / made
    if layout is not None and not folder.exists():
        _apart("make_folder", name, str(folder))
    words = words_of(name, "tiny" if layout is None else str(folder))
    found = _apart("estimated", words)
    free = _available()
    needed = max(found["peak"], found["loading"])
    if free < needed + SPARE:
        raise SystemExit(f"{name}: {free:,} bytes are free, and {needed + SPARE:,} are needed")
    # files that are mapped, twice for a moment, count too, and can be given back at any time
    mapped = 2 * sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    own = _apart("train", words, free - SPARE // 2 + mapped)
    bars.note(f"{name}_bytes", {"estimated": found["peak"], "measured": own["peak"]})
    bars.note(f"{name}_loading", {"estimated": found["loading"], "measured": own["loading"]})
    bars.note(f"{name}_step_seconds", own["seconds"])
    if layout is not None:  # of a small one, libraries that are loaded late take more than it
        bars.at_most(f"{name}_off", abs(found["peak"] / own["peak"] - 1), 0.1)


def _apart(what: str, *given: Any) -> Any:
    """A function of this file in a process of its own, whose memory is then free again."""
    line = [sys.executable, __file__, "--apart", json.dumps([what, given])]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def _available() -> int:
    from trainer.common.main_memory import free_memory

    free = free_memory()
    assert free is not None
    return free


def main() -> None:
    if sys.argv[1:2] == ["--apart"]:
        what, given = json.loads(sys.argv[2])
        print(json.dumps(globals()[what](*given)))
        return
    parser = parser_of(__doc__, tuple(CASES))
    options = parser.parse_args()
    bars = Bars("memory", options.quick, update=True)
    known = QUICK if options.quick else PARTS
    chosen = chosen_of(options.only, tuple(CASES), parser) if options.only else known
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            measure(bars, name, Path(scratch))
    bars.write()


if __name__ == "__main__":
    main()
