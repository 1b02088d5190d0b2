"""Methods: what adapts the attention of a backbone. One file each, found by its name in
`<level>/<name>.py`.

This file holds the contract (`Method`, `Edit`), the order of edits, and the rules by which methods
compose or refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from trainer import resources

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.model import AttentionModel

ORDER = ("structure", "attention", "storage", "adapt", "select")


@dataclass(frozen=True)
class Edit:
    """What one method did to a model.

    sites: names of the attention sites it touched. claims: `(module or parameter path, aspect)` no
    other method may claim. trains: names of the parameters it trains. loss: an extra term added to
    the objective, without arguments.
    """

    sites: tuple[str, ...] = ()
    claims: tuple[tuple[str, str], ...] = ()
    trains: tuple[str, ...] = ()
    loss: Callable[[], Tensor] | None = None


class Method(BaseModel):
    """Options of a method and the one thing it can do. Subclasses are frozen records; importing one
    loads no torch."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[Literal["structure", "attention", "storage", "adapt", "select"]]

    def apply(self, model: AttentionModel) -> Edit:
        """Edits `model` in place. Raises ValueError where nothing matches."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plan:
    """What applying a recipe's methods did; edits in the order they were applied."""

    edits: Mapping[str, Edit]
    trained: int
    total: int
    trained_bytes: int
    names: tuple[str, ...] = field(default=(), repr=False)


def names() -> list[str]:
    """Every method there is, by file name."""
    return [path.stem for path in resources.methods()]


def find(name: str) -> type[Method]:
    """The class in the file called `name`: its one subclass of `Method`."""
    path = next(path for path in resources.methods() if path.stem == name)
    found: type[Method] = resources.the_class(f"trainer.methods.{path.parent.name}.{name}", Method)
    return found


def apply(model: AttentionModel, methods: Mapping[str, Method]) -> Plan:
    """Freezes the model, applies the methods in the order of `ORDER`, and marks what trains.

    Raises:
        ValueError: two methods claim one thing, a method matches nothing, or nothing trains.
    """
    model.requires_grad_(False)
    edits: dict[str, Edit] = {}
    owners: dict[tuple[str, str], str] = {}
    for name, method in sorted(methods.items(), key=lambda item: ORDER.index(item[1].kind)):
        try:
            edit = method.apply(model)
        except ValueError as error:
            raise ValueError(f"methods.{name}: {error}") from error
        for claim in edit.claims:
            other = owners.setdefault(claim, name)
            if other != name:
                raise ValueError(
                    f"methods.{other} and methods.{name} both claim {claim[1]} of {claim[0]}; "
                    "remove one of them, "
                    f"as in methods.{name}=null"
                )
        edits[name] = edit
    trained = {parameter for edit in edits.values() for parameter in edit.trains}
    if not trained:
        raise ValueError(
            f"nothing would train with methods {', '.join(edits)}; add one that trains weights"
        )
    parameters = dict(model.named_parameters())
    for parameter in trained:
        parameters[parameter].requires_grad_(True)
    chosen = [parameters[parameter] for parameter in trained]
    return Plan(
        edits=edits,
        trained=sum(item.numel() for item in chosen),
        total=sum(item.numel() for item in parameters.values()),
        trained_bytes=sum(item.numel() * item.element_size() for item in chosen),
        names=tuple(sorted(trained)),
    )
