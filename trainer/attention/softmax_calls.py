"""How a layer computes its attention, read from the names in its compiled code: by a call that a
host can take, by another library's, or by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

# `dispatch_attention_fn` ends in the other one, unless another back end is set
TAKEN = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn"})
BY_HAND = frozenset({"softmax", "baddbmm", "get_attention_scores"})
ELSEWHERE = frozenset({"FLEX", "flex_attention"})
DEPTH = 3  # functions called by functions, up to so many

Way = Literal["call", "back end", "hand", "other"]


def way_of(module: nn.Module) -> Way:
    """How a layer attends: `call` where it makes a call a host can take; `back end` where the call
    goes to another back end than torch's own; `hand` where it has a softmax and no such call;
    `other` where its code has neither, as linear attention."""
    kind: Any = type(module)
    processor = getattr(module, "processor", None)
    own: Any = type(processor)
    way: Way = _way(kind, "forward")
    if way == "other" and processor is not None:
        way = _way(own, "__call__")
        if way == "other" and hasattr(own, "forward"):
            way = _way(own, "forward")
    backend = getattr(processor, "_attention_backend", None)
    if way == "call" and backend not in (None, "native"):
        return "back end"
    return way


@cache
def _way(kind: type, method: str) -> Way:
    names = names_in(kind, method)
    if names & TAKEN:
        return "back end" if names & ELSEWHERE else "call"
    return "hand" if names & BY_HAND else "other"


def names_in(kind: type, method: str) -> set[str]:
    """The names in the code of a class's method and of the functions it calls."""
    return set(_names(kind, getattr(kind, method, None), DEPTH))


def _names(kind: type, function: object, depth: int) -> Iterator[str]:
    """The names that a method uses, and those that the functions and methods it calls use."""
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, FunctionType):
        return
    for code in _codes(function.__code__):
        for name in code.co_names:
            yield name
            if not depth:
                continue
            if name == "super":
                yield from _inherited(kind, function, depth)
            called: Any = function.__globals__.get(name, getattr(kind, name, None))
            if called is not function and name not in ("forward", "__call__"):
                yield from _names(kind, called, depth - 1)


def _inherited(kind: type, function: FunctionType, depth: int) -> Iterator[str]:
    for base in kind.__mro__:
        other = base.__dict__.get(function.__name__)
        if other is not None and other is not function:
            yield from _names(base, other, depth - 1)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
