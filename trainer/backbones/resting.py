"""Parts of a backbone at rest: they stay in main memory, and are on the device while they are
used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.backbones.backbone_facts import BackboneFacts

SAME_MEMORY = ("cpu", "mps")  # devices that have no memory of their own


def rest(model: BackboneFacts, parts: Iterable[str]) -> None:
    """Puts these parts, of which nothing trains, to rest, until `wake`. Backbones bring a part that
    they use to the device for the time of the call."""
    if model.device.type in SAME_MEMORY:
        return
    for part in parts:
        _move(model, part, torch.device("cpu"))
        model.at_rest.add(part)


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
