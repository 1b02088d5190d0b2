"""Methods applied to a model that is on a device: what they insert is there too, or gets there with
`place`, nothing is computed of tensors on two devices, and the output is that of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from far_device import FAR, Far, far_device
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.backbones import load_backbone
from trainer.backbones.device import CPU, Placement, place
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods

# left out: what the stand-in for a device cannot do. A list as an index (the methods whose frames
# read each other) and the kernels behind autocast or torch's choice of one need a driver
EXAMPLES: dict[str, dict[str, Any]] = {
    "agent_attention": {"side": 2},
    "animatediff": {"heads": 2},
    "c_lora": {"rank": 2, "task": 1},
    "cascade": {"time": 2},
    "coda_prompt": {"pool": 5, "length": 4, "task": 1, "num_tasks": 2},
    "controls": {"sites": "up | block & self", "projections": ["q", "v"], "rank": 2},
    "dora": {"sites": "cross", "projections": ["k", "v"], "rank": 2},
    "frame_interpolation": {"between": 1},
    "full": {},
    "gen1": {"heads": 2, "structure": 1},
    "imagen_video": {"heads": 2},
    "inflora": {"rank": 2, "task": 1, "num_tasks": 2},
    "lora": {"sites": "cross", "rank": 2, "text_encoder": ["v"]},
    "longlora": {"rank": 2},
    "magicvideo": {"heads": 2},
    "make_a_video": {"heads": 2},
    "new_token": {"tokens": ["<v1>"], "init": "fox"},
    "peft_adapter": {"type": "loha", "options": {"r": 2}, "sites": "self & down | self & block"},
    "selective": {"sites": "cross", "projections": ["k", "v"], "detach_first_token": True},
    "tlora": {"rank": 4},
    "vdm": {"heads": 2},
    "word_embedding": {"tokens": ["fox", "red"]},
}


def made(folder: Path, name: str, where: Placement) -> Any:
    model = place(load_backbone(backbone_spec(str(folder)), "tiny").eval(), where, hold=False)
    plan = apply_methods(model, methods_of({name: EXAMPLES[name]}))
    return place(model, where, plan.stored)


@torch.no_grad()
def predicted(model: Any) -> Tensor:
    x = torch.randn(4, model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 100, 700, 700], device=model.device)
    condition = model.encode_prompts(["a fox", "a cat"]).per_frame(2)
    with use(StepContext(0, 1, t, 2)):
        found: Tensor = model.predict(x.to(model.device), t, condition)
    return found.cpu()


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_on_a_device(name: str, tiny_folder: Path) -> None:
    wanted = predicted(made(tiny_folder, name, CPU))
    with far_device() as seen:
        model = made(tiny_folder, name, Placement(FAR, "fp32"))
        found = predicted(model)
        named = [*model.named_parameters(), *model.named_buffers()]
        left = [path for path, value in named if not isinstance(value, Far)]
    assert not left and not seen.missed and seen.placed
    assert torch.allclose(found, wanted, atol=1e-5)
