"""What a file of another tool is, and how its reading is judged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 1e-6


@dataclass(frozen=True)
class Made:
    """A file or folder, and the weights of the model that its writer had: names as
    `unet.conv_in.weight`; those of layers that it does not name are the base's. words: the rows of
    new words."""

    path: Path
    wanted: Mapping[str, Tensor]
    words: Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One kind of file of one tool.

    make: writes the file, from a base that it may change, into an empty folder. by: who wrote it
    and who gave the weights to compare with: the tool itself, or its documented layout and the
    equation. refused: a pattern of the message, where it is not read.
    """

    tool: str
    kind: str
    make: Callable[[Any, Path], Made]
    by: str
    refused: str | None = None
    backbone: str = "tiny"


def made(path: Path, model: Any, words: Mapping[str, Tensor] | None = None) -> Made:
    """A file of a live model, whose adapters its tool has merged already."""
    return Made(path, weights(model), words or {})


def weights(model: Any) -> dict[str, Tensor]:
    parts = {model.denoiser_name: model.denoiser, **model.text_encoders}
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in parts.items()
        for name, value in module.named_parameters()
        if "token_embedding" not in name
    }


@torch.no_grad()
def disturb(module: nn.Module, mark: str = "lora_", seed: int = 3) -> None:
    """Changes every parameter of an adapter as if it had trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if mark in name and "base_layer" not in name:
            value += 0.05 * torch.randn(value.shape, generator=generator)


@torch.no_grad()
def live(layer: Any) -> tuple[Tensor, Tensor]:
    """The weight and bias that a linear or convolution layer has in its forward, whatever acts on
    it: its answers to unit inputs less that to zeros."""
    if isinstance(layer, nn.Linear):
        bias = layer(torch.zeros(1, layer.in_features))[0]
        weight = (layer(torch.eye(layer.in_features)) - bias).T
    else:
        (side, _), (stride, _), (padding, _) = layer.kernel_size, layer.stride, layer.padding
        count, size, first = layer.in_channels * side * side, 2 * side + 2, stride - padding
        x = torch.zeros(count, layer.in_channels, size, size)
        units = torch.eye(count).view(count, layer.in_channels, side, side)
        x[:, :, first : first + side, first : first + side] = units
        bias = layer(torch.zeros_like(x[:1]))[0, :, 1, 1]
        rows = layer(x)[:, :, 1, 1] - bias
        weight = rows.T.reshape(-1, layer.in_channels, side, side)
    return weight.contiguous(), bias


def judge(made: Made, base: Any) -> tuple[float, str]:
    """Reads a file as `import` does, without its files on disk. Returns the largest difference
    between a weight of the adapted model, with the adapter merged, and the writer's; and what other
    tools' loaders say."""
    from trainer.export.apply_bundle import add_to
    from trainer.export.bundle_methods import recipe_of, tensors_of
    from trainer.export.detect import detect
    from trainer.export.import_ import read_bundle
    from trainer.export.import_check import Question, compare
    from trainer.ops.adapters.inject import fold

    name, model = detect(made.path), fresh(base)
    bundle = read_bundle(name, made.path, model)
    methods = recipe_of(bundle, model)
    line = compare(
        Question(name, made.path, bundle), add_to(fresh(base), bundle), lambda: fresh(base)
    )
    tensors, _ = tensors_of(bundle, methods, model)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)
    for module in (model.denoiser, *model.text_encoders.values()):
        fold(module)
    found = weights(model)
    assert set(found) >= set(made.wanted)
    largest = max(float((found[name] - value).abs().max()) for name, value in made.wanted.items())
    for word, row in made.words.items():
        number = model.tokenizer.convert_tokens_to_ids(word)
        table = model.text_encoder.get_input_embeddings().weight
        largest = max(largest, float((table[number] - row).abs().max()))
    return largest, line


def fresh(base: Any) -> Any:
    """A copy of a base that a tool may change."""
    return copy.deepcopy(base)
