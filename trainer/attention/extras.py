"""Modules of methods that belong to no attention site, such as an image projector or a head.

The model keeps them by name, so their parameters are called `extras.<name>.<parameter>`: they
train, are stored in the adapter and are found again as every other parameter is.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from trainer.attention.errors import TakenError

PART = "extras"  # how the names of their parameters begin
ASPECT = "the name"


class Extras(nn.ModuleDict):
    """The modules by name, and by name the method each belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[str, str] = {}


class HasExtras(Protocol):
    """The part of an `AttentionModel` that matters here."""

    extras: Extras

    @property
    def denoiser(self) -> nn.Module: ...


def register_extra(
    model: HasExtras, name: str, module: nn.Module, *, owner: str
) -> tuple[str, ...]:
    """Registers a module of the method `owner` under a name; it moves to the denoiser's device and
    keeps its precision. Returns the names of its parameters, for `Edit.trains` and its claims.

    Raises:
        TakenError: another method has a module of that name.
        ValueError: it is no name for a module.
    """
    extras = model.extras
    path = f"{PART}.{name}"
    if name in extras:
        raise TakenError(path, ASPECT, extras.owners[name])
    if not name.isidentifier() or hasattr(extras, name):
        raise ValueError(f"{name!r} is no name for an extra module; give letters and underscores")
    extras[name] = module.to(next(model.denoiser.parameters()).device)
    module.train(model.denoiser.training)
    extras.owners[name] = owner
    return tuple(f"{path}.{inner}" for inner, _ in module.named_parameters())
