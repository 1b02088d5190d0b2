"""Applies the methods of a recipe to a model, in order, and refuses those that cannot share it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.attention.errors import TakenError
from trainer.common.lookup import method_files, only_class
from trainer.methods.method import ORDER, Edit, Method

if TYPE_CHECKING:
    from torch.nn import Parameter

    from trainer.attention.model import AttentionModel


@dataclass(frozen=True)
class Plan:
    """What applying a recipe's methods did; edits in the order they were applied.

    trained, total: how many values train, and how many the model has, those in 4 bits too.
    """

    edits: Mapping[str, Edit]
    trained: int
    total: int
    trained_bytes: int
    names: tuple[str, ...] = field(default=(), repr=False)
    keeps: tuple[str, ...] = field(default=(), repr=False)

    @property
    def stored(self) -> tuple[str, ...]:
        """What an adapter holds: all that trains, and all the base cannot give back."""
        return (*self.names, *self.keeps)


def method_names() -> list[str]:
    """Every method there is, by file name."""
    return [path.stem for path in method_files()]


def find_method(name: str) -> type[Method]:
    """The class in the file called `name`: its one subclass of `Method`."""
    path = next(path for path in method_files() if path.stem == name)
    found: type[Method] = only_class(f"trainer.methods.{path.parent.name}.{name}", Method)
    return found


def in_order(methods: Mapping[str, Method]) -> dict[str, Method]:
    """As they are applied: by `ORDER`, and those of one kind as they stand."""
    return dict(sorted(methods.items(), key=lambda item: ORDER.index(item[1].kind)))


def apply_methods(
    model: AttentionModel,
    methods: Mapping[str, Method],
    seed: int = 0,
    trains: bool = True,
    held: Collection[str] = (),
) -> Plan:
    """Freezes the model, applies the methods in the order of `ORDER`, and marks what trains.

    What a method draws at random depends on `seed` and its own name, not on what came before it.
    trains: False for a model that is used as it is, where nothing may be left to train. held: names
    of methods whose tensors stay as they are, and are stored.

    Raises:
        ValueError: two methods claim one thing, a method matches nothing, or nothing trains, or
        something does without `trains`.
    """
    from trainer.ops.adapters.nf4 import numel

    edits: dict[str, Edit] = {}
    owners: dict[tuple[str, str], str] = {}
    for name, method in in_order(methods).items():
        before = dict(model.named_parameters())
        try:
            with _seeded(seed, name):
                edit = method.apply(model)
        except TakenError as taken:
            if taken.owner not in edits:
                raise ValueError(
                    f"methods.{name}: {taken}, by the run this backbone is the result of; choose "
                    "other sites, or as the backbone what that run was trained on"
                    + (", or its export with format=merged" if taken.merges else "")
                ) from taken
            raise ValueError(_both_claim(taken.owner, name, taken.aspect, taken.thing)) from taken
        except ValueError as error:
            raise ValueError(f"methods.{name}: {error}") from error
        if moved := _moved(before, model):
            edits = {other: earlier.renamed(moved) for other, earlier in edits.items()}
            owners = {claim: own for own, earlier in edits.items() for claim in earlier.claims}
        for thing, aspect in edit.claims:
            other = owners.setdefault((thing, aspect), name)
            if other != name:
                raise ValueError(_both_claim(other, name, aspect, thing))
        edits[name] = edit
    edits |= {name: edits[name].held() for name in held}
    trained = {parameter for edit in edits.values() for parameter in edit.trains}
    if not trains:
        for name, edit in edits.items():
            if edit.trains:
                raise ValueError(
                    f"methods.{name} has weights to train, which nothing has trained; fit a recipe "
                    "with it, and give what that made as adapter="
                )
    elif not trained:
        raise ValueError(
            f"nothing would train with methods {', '.join(edits)}; add one that trains weights"
            + (f", or give optim.lrs.{next(iter(held))} more than 0" if held else "")
        )
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for parameter in trained:
        parameters[parameter].requires_grad_(True)
    chosen = [parameters[parameter] for parameter in trained]
    return Plan(
        edits=edits,
        trained=sum(item.numel() for item in chosen),
        total=sum(map(numel, parameters.values())),
        trained_bytes=sum(item.numel() * item.element_size() for item in chosen),
        names=tuple(sorted(trained)),
        keeps=tuple(sorted({kept for edit in edits.values() for kept in edit.keeps})),
    )


def _moved(before: Mapping[str, Parameter], model: AttentionModel) -> dict[str, str]:
    """Old name to new of the parameters that have another name now: an adapter put a layer of its
    own around theirs."""
    after = {id(parameter): name for name, parameter in model.named_parameters()}
    names = ((old, after.get(id(parameter), old)) for old, parameter in before.items())
    return {old: new for old, new in names if old != new}


def _both_claim(first: str, second: str, aspect: str, thing: str) -> str:
    return (
        f"methods.{first} and methods.{second} both claim {aspect} of {thing}; remove one of them, "
        f"as in methods.{second}=null"
    )


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    import torch

    from trainer.common.seeds import seed_of

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "method", name))
        yield
