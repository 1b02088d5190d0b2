"""The names that other tools have for the layers of a transformer.

Importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# a name to the layers here that it stands for: several, in the order of its rows, where the other
# code keeps them in one layer; `{}` in both is the number of a block
Table = Mapping[str, tuple[str, ...]]


def _never(config: Mapping[str, Any]) -> bool:
    return False


class ModelNames(NamedTuple):
    """What the header of a file calls the model it is for: version, sd-scripts' and musubi-tuner's
    own word (`ss_base_model_version`), and architecture, ModelSpec's."""

    version: str
    architecture: str


@dataclass(frozen=True)
class Scripts:
    """How sd-scripts or musubi-tuner, `trainer`, writes adapters of a transformer.

    layers: those it adapts, by the names it gives them before it joins them with underscores.
    module: what the headers of its files call its code. model: (config of the transformer) -> what
    they call the model. stock: (config of the transformer) -> whether diffusers' own loader reads
    these files.
    """

    trainer: str
    layers: Table
    module: str
    model: Callable[[Mapping[str, Any]], ModelNames]
    stock: Callable[[Mapping[str, Any]], bool] = _never


@dataclass(frozen=True)
class ToolNames:
    """What one class of transformers is called elsewhere; names here are those of diffusers.

    original: the layers by the names of the model's first code. comfyui: by which names ComfyUI's
    loader finds these layers, `diffusers` for the names here, `original`, or none of them.
    parameters: ComfyUI's names of parameters that belong to no layer, to the names here. scripts:
    None where neither sd-scripts nor musubi-tuner trains such a model.
    """

    original: Table = field(default_factory=dict)
    comfyui: Literal["diffusers", "original", ""] = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    scripts: Scripts | None = None


def block_names(
    start: str, own: str, layers: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """The table of the layers inside a block, from their names in it: `start` is what the other
    code calls the block, `own` what it is called here."""
    return {
        f"{start}.{{}}.{name}": tuple(f"{own}.{{}}.{layer}" for layer in found)
        for name, found in layers.items()
    }


def same_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The table of layers that are called the same elsewhere."""
    return {name: (name,) for name in names}
