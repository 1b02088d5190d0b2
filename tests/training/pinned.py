"""Short seeded runs of eight recipes and what they must go on giving, to the last bit.

    python tests/training/pinned.py            # prints what differs from pinned.json
    python tests/training/pinned.py --write    # records this machine's values beside the others

A refactor leaves these values alone; a change of mathematics records new ones and says so in its
commit. Floating-point sums depend on the processor and on the build of torch, so each set of values
stands under a digest of what this machine computes (`numerics`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PINNED = Path(__file__).with_suffix(".json")
SHORT = [
    "run.id=pinned", "run.steps=3", "run.log_every=1", "run.batch_size=2", "run.validate_every=3",
    "run.checkpoint_every=0", "preview.every=0", "tracker=none", "run.workers=0",
]  # fmt: skip
CLASS_IMAGES = ["data.prior_images=4", "data.prior_prompts=[a fox, a cat]", "data.prior_steps=2"]
CLASS_IMAGES += ["data.class_word=null"]
RUNS: dict[str, list[str]] = {
    "lora": ["recipe=lora", *CLASS_IMAGES],
    "custom_diffusion": ["recipe=custom_diffusion", *CLASS_IMAGES, "run.accumulate=2"],
    "qlora": ["recipe=qlora", *CLASS_IMAGES],
    "animatediff": ["recipe=animatediff", "data.count=16", "data.validation=4"],
    "linear_swap": ["recipe=linear_swap", "data.count=16", "data.validation=4"],
    "c_lora": [
        "recipe=c_lora", *CLASS_IMAGES, "run.validate_every=0", "continual.images=0",
        "continual.concepts=[sprite:penguin, sprite:strawberry]",
    ],
    "tiny_dit_lora": ["recipe=lora", "backbone=tiny_dit", *CLASS_IMAGES],
    "tiny_unet": ["recipe=tiny_unet", "data.count=16", "data.validation=4"],
}  # fmt: skip


def run(name: str, out: Path) -> dict[str, Any]:
    """Trains one of `RUNS` under `out` and returns its losses in hexadecimal and its adapter's
    digest: names, shapes, types and bytes, not the header, which holds the recipe."""
    from trainer.cli.fit import train_recipe
    from trainer.config.load import load_recipe

    given = {word.split("=")[0] for word in RUNS[name]}
    words = [word for word in SHORT if word.split("=")[0] not in given]
    folder = train_recipe(load_recipe([*RUNS[name], *words, f"run.out={out}"]))
    logs = sorted(folder.rglob("metrics.jsonl"))
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    kinds = ("train/loss", "val/loss")
    losses = {kind: [float(line[kind]).hex() for line in lines if kind in line] for kind in kinds}
    adapters = sorted(folder.rglob("adapter.safetensors"))
    return {**losses, "adapters": [digest(path) for path in adapters]}


def digest(path: Path) -> str:
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.contiguous().flatten().view(_bytes()).numpy().tobytes())
    return found.hexdigest()


def _bytes() -> Any:
    import torch

    return torch.uint8


def numerics() -> str:
    """What this machine makes of products, convolutions, attention and a 4-bit round trip."""
    import torch
    from torch.nn import functional as F

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 24, 64, generator=draw)
    image = torch.randn(2, 16, 17, 17, generator=draw)
    kernel = torch.randn(24, 16, 3, 3, generator=draw)
    found = hashlib.sha256(torch.__version__.encode())
    for kind in (torch.float32, torch.bfloat16):
        q = x.to(kind, copy=True).requires_grad_()
        o = F.scaled_dot_product_attention(q, q, q).float().exp().sum()
        o.backward()
        c = F.conv2d(image.to(kind), kernel.to(kind))
        m = x.to(kind) @ x.to(kind).transpose(-1, -2)
        g = F.group_norm(F.gelu(F.silu(image.to(kind))), 4)
        for value in (q.grad, c, m, m.softmax(-1), g):
            assert value is not None
            found.update(value.detach().float().numpy().tobytes())
    return found.hexdigest()[:16]


def main(words: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    known = json.loads(PINNED.read_text()) if PINNED.is_file() else {}
    own = known.setdefault(numerics(), {})
    wrong = 0
    for name in [word for word in words if word in RUNS] or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRAINER_CACHE"] = f"{folder}/cache"
            found = run(name, Path(folder) / "runs")
        if "--write" in words:
            own[name] = found
        same = name in own and own[name] == {kind: found[kind] for kind in own[name]}
        wrong += not same
        print(name, "as pinned" if same else f"differs: {found}")
    if "--write" in words:
        PINNED.write_text(json.dumps(known, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
