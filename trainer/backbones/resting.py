"""Parts of a backbone at rest: they stay in main memory, and are on the device while they are
used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.backbones.backbone_facts import BackboneFacts

SAME_MEMORY = ("cpu", "mps")  # devices that have no memory of their own
ROOM = 0.75  # the share of a device's free memory that weights may take; the rest is to compute in


def rest(model: BackboneFacts, parts: Iterable[str]) -> None:
    """Puts these parts, of which nothing trains, to rest, until `wake`. Backbones bring a part that
    they use to the device for the time of the call; a backbone that is moved leaves them."""
    if model.device.type in SAME_MEMORY:
        return
    for part in parts:
        _move(model, part, torch.device("cpu"))
        model.at_rest.add(part)


def rest_if_tight(model: BackboneFacts, device: torch.device) -> None:
    """Marks the text encoders and the VAE of a frozen model as at rest where a device, on which it
    is not yet, has too little memory for all parts; they are to stay where they are."""
    if device.type in SAME_MEMORY or model.device == device:
        return
    free = free_on(device)
    if free is not None and held_bytes(model) > ROOM * free:
        model.at_rest.update(model.text_encoders, ["vae"])


def held_bytes(model: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(value.numel() * value.element_size() for value in model.parameters())


def free_on(device: torch.device) -> int | None:
    """Bytes that a device still has; None where it does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def wake(model: BackboneFacts) -> None:
    """No part is at rest any more; whoever moves the whole backbone moves them too."""
    model.at_rest.clear()


@contextmanager
def awake(model: BackboneFacts, parts: Iterable[str]) -> Iterator[None]:
    """Those of these parts that are at rest are on the device inside the block."""
    here = [part for part in parts if part in model.at_rest]
    model.at_rest.difference_update(here)
    try:
        for part in here:
            _move(model, part, model.device)
        yield
    finally:
        for part in here:
            _move(model, part, torch.device("cpu"))
        model.at_rest.update(here)


def _move(model: BackboneFacts, part: str, device: torch.device) -> None:
    """Moves the weights alone: several processes that train together compare the buffers, which are
    small, on their devices."""
    found = model.get_submodule(part)
    assert not any(value.requires_grad for value in found.parameters()), f"{part} trains"

    def moved(value: Tensor) -> Tensor:
        return value.to(device) if isinstance(value, nn.Parameter) else value

    found._apply(moved)
