"""LyCORIS' own loader, where the package is installed: what it makes of a file in sd-scripts' or
its own names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.export.tensor_files import load_tensors

STARTS = ("lora_unet_", "lora_te", "lycoris_")
LEVEL = "lora_te_text_model_"  # of transformers 4, whose text encoders have that level


def reads(keys: Iterable[str]) -> bool:
    """Whether the package is installed and knows the names of such a file."""
    return find_spec("lycoris") is not None and any(key.startswith(STARTS) for key in keys)


@torch.no_grad()
def load(file: Path, base: Any) -> None:
    """Gives every layer of a model the weight that it has while LyCORIS' network acts on it."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    for module in _modules(file, base):
        if module is None:
            continue
        layer, (weight, bias) = module.org_module[0], _added(module.eval())
        layer.weight += weight
        if bias is not None:
            layer.bias += bias


def _modules(file: Path, base: Any) -> list[Any]:
    """LyCORIS' modules of the layers that it finds."""
    from lycoris import kohya
    from lycoris.wrapper import create_lycoris_from_weights

    tensors, _ = load_tensors(file)
    if any(key.startswith("lycoris_") for key in tensors):
        network, _ = create_lycoris_from_weights(1.0, "", base.denoiser, weights_sd=tensors)
        return list(network.loras)
    encoder: Any = next(iter(base.text_encoders.values()))
    if any(key.startswith(LEVEL) for key in tensors) and not hasattr(encoder, "text_model"):
        around = nn.Module()
        around.text_model = encoder
        encoder = around
    with _no_targets(kohya.LycorisNetworkKohya):
        network, _ = kohya.create_network_from_weights(
            multiplier=1.0,
            file="",
            vae=None,
            text_encoder=encoder,
            unet=base.denoiser,
            weights_sd=tensors,
        )
    return [*network.unet_loras, *network.text_encoder_loras]


@contextmanager
def _no_targets(network: Any) -> Iterator[None]:
    """LyCORIS makes a whole network by its targets before it makes the one of the file. By its own
    targets some layers of diffusers' U-Net are there twice, which ends in an assertion."""
    names = [name for name in vars(network) if "_TARGET_REPLACE_" in name]
    before = {name: getattr(network, name) for name in names}
    for name in names:
        setattr(network, name, [])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(network, name, value)


def _added(module: Any) -> tuple[Tensor, Tensor | None]:
    """What a module adds to the weight and bias of its layer in its forward; its `merge_to` counts
    the strength of LoHa and LoKr twice."""
    seen: list[tuple[Tensor, Tensor | None]] = []

    def op(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor | float:
        seen.append((weight.detach(), bias))
        return 0.0

    module.op = op
    shape = module.org_module[0].weight.shape
    module(torch.zeros(1, *shape[1:]))
    return seen[0]
