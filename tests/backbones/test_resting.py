"""Parts that stay in main memory where a device has too little, and are there while they are used;
`far_device` stands for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from far_device import FAR, Far, far_device
from torch import Tensor

from trainer.backbones import resting
from trainer.backbones.device import Placement
from trainer.backbones.resting import wake
from trainer.config.lineage import backbone_spec
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.runs.adapter import load_base

LEAN = Placement(FAR, "fp32", lean=True)


def opened(folder: Path, placement: Placement) -> Any:
    return load_base(backbone_spec(str(folder)), "tiny", placement, read_held=True)


def painted(model: Any) -> Tensor:
    settings = Sampling(steps=2, guidance=3.0, size=(32, 32))
    found = sample(model, ["a fox", "a star"], [0, 1], settings=settings)
    return found.to("cpu")


def far_parts(model: Any) -> set[str]:
    return {n.split(".")[0] for n, v in model.named_parameters() if isinstance(v.data, Far)}


def size(model: Any) -> int:
    return sum(value.nbytes for value in model.parameters())


def test_parts_rest_where_a_device_has_too_little(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = opened(tiny_folder, Placement(torch.device("cpu"), "fp32"))
    wanted, whole = painted(exact), size(exact)
    monkeypatch.setattr(resting, "free_on", lambda device: whole)
    with far_device() as seen:
        model = opened(tiny_folder, LEAN)
        assert model.at_rest == {"text_encoder", "vae"}
        assert far_parts(model) == {"unet"}
        found = painted(model)
        assert far_parts(model) == {"unet"}
        wake(model)
        model.to(FAR)
        assert far_parts(model) == {"unet", "text_encoder", "vae"}
    assert not seen.missed and {"CLIPMLP", "Conv2d"} & set(seen.placed)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("free", ["enough", "unknown"])
def test_all_parts_are_on_a_device_that_has_room(
    free: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = size(opened(tiny_folder, Placement(torch.device("cpu"), "fp32")))
    room = {"enough": whole * 4 // 3 + 1, "unknown": None}[free]
    monkeypatch.setattr(resting, "free_on", lambda device: room)
    with far_device():
        model = opened(tiny_folder, LEAN)
        assert not model.at_rest
        assert far_parts(model) == {"unet", "text_encoder", "vae"}


def test_a_model_that_trains_is_moved_whole(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run decides itself what rests, when prompts and latents are cached."""
    monkeypatch.setattr(resting, "free_on", lambda device: 1)
    with far_device():
        model = opened(tiny_folder, Placement(FAR, "fp32"))
        assert far_parts(model) == {"unet", "text_encoder", "vae"}
