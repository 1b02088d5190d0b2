"""Conditions beside the text that methods own by name: reference pictures, say, or boxes.

A method describes its condition in a `FurtherCondition` and calls `register_condition`:

    def encode(model, inputs, present) -> {"shown": tokens}    # (b, n, d)
    own = FurtherCondition("shown", self.name, ("reference",), encode=encode)
    register_condition(model, own)

What trains or samples calls `told_further` with the inputs of a batch; what `encode` gives is then
in the `Condition` of every row, where ops read it as `ctx.condition.further["shown"]`. Without the
first of its inputs a condition is not there, and the method's ops leave everything as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trainer.attention.errors import TakenError

if TYPE_CHECKING:
    from trainer.attention.condition import Condition

ASPECT = "the condition"
# the model, the inputs of b samples by name, each (b, ...), and of which samples the condition is
# there, (b,) bool, to tensors (b, ...) by name; where it is not, what stands for none
Encode = Callable[[Any, Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class FurtherCondition:
    """A condition of a name, of the method `owner`.

    reads: the inputs of a batch that it is made of, by name; without the first there is none.
    encode: see `Encode`; it finds its modules in the model, which may be a copy of the one it was
    registered at. dropout: the share of training samples that are told of none, so that guidance
    can compare.
    """

    name: str
    owner: str
    reads: tuple[str, ...]
    encode: Encode
    dropout: float = 0.0


class HasConditions(Protocol):
    """The part of an `AttentionModel` that matters here."""

    denoiser_name: str
    further_conditions: dict[str, FurtherCondition]


def register_condition(model: HasConditions, condition: FurtherCondition) -> None:
    """Makes a condition one of the model's.

    Raises:
        TakenError: another method has one of that name.
    """
    other = model.further_conditions.get(condition.name)
    if other is not None:
        raise TakenError(f"{model.denoiser_name}.{condition.name}", ASPECT, other.owner)
    model.further_conditions[condition.name] = condition


def told_further(
    model: HasConditions,
    condition: Condition,
    inputs: Mapping[str, Tensor],
    *,
    present: Callable[[FurtherCondition], Tensor],
) -> Condition:
    """The condition of b samples with all that the model's further conditions make of the inputs.

    present: of which samples one of them is there, (b,) bool.
    """
    found: dict[str, Tensor] = {}
    for own in model.further_conditions.values():
        if own.reads[0] in inputs:
            found |= own.encode(model, inputs, present(own))
    return replace(condition, further={**condition.further, **found}) if found else condition


def told_groups(
    model: HasConditions,
    condition: Condition,
    inputs: Mapping[str, Tensor],
    *,
    sees: Sequence[bool],
) -> Condition:
    """The condition of groups of b rows each, which all have the same inputs (b, ...). sees: which
    of the groups are told of them; the others are told of none."""
    found: dict[str, Tensor] = {}
    for own in model.further_conditions.values():
        given = inputs.get(own.reads[0])
        if given is None:
            continue
        every = torch.ones(len(given), dtype=torch.bool, device=given.device)
        made = {seen: own.encode(model, inputs, every if seen else ~every) for seen in set(sees)}
        for name in made[sees[0]]:
            found[name] = torch.cat([made[seen][name] for seen in sees])
    return replace(condition, further={**condition.further, **found}) if found else condition
