"""One run of a layer that keeps its own processor: what it is called with, and the stages outside
its attention call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.find_attention import text_argument
from trainer.attention.op import label
from trainer.attention.projections import Role, context_roles
from trainer.attention.spans import Lengths, spans_of
from trainer.attention.stages import Stages

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.context import StepContext
    from trainer.attention.sites import Site


class LayerRun:
    """The arguments of one forward of a layer, and the `SiteCall` that its stages share."""

    def __init__(
        self,
        site: Site,
        stages: Stages,
        *,
        ctx: StepContext,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.site, self.stages = site, stages
        kind: Any = type(site.module)
        self.names = _parameters(kind)
        self.args, self.kwargs = args, dict(kwargs)
        self.call = SiteCall(site, ctx, self._lengths())
        self.call.part = -1  # the first attention call makes it 0
        self._seen_context = 0  # how many layers of keys and values got what `context` made

    def enter(self) -> None:
        """The stage `tokens`, on the image tokens the layer is called with."""
        ops = self.stages["tokens"]
        if not ops:
            return
        x = self._argument(self.names[0])
        image = self._image(x)
        changed = x[:, image]
        for op in ops:
            changed = op.tokens(changed, self.call)
        if changed.shape[1] != image.stop - image.start:
            self._refuse_positions(ops[0])
        self._replace(torch.cat([x[:, : image.start], changed, x[:, image.stop :]], dim=1))

    def leave(self, output: Any) -> Any:
        """The stage `restore`, on the image tokens the layer returns."""
        ops = self.stages["restore"]
        if self.stages["context"] and not self._seen_context:
            raise RuntimeError(
                f"{label(self.stages['context'][0])} changes what keys and values are made of, and "
                f"{self.site.name!r} made them of something else; choose other sites"
            )
        if not ops:
            return output
        first = output[0] if isinstance(output, tuple) else output
        image = self._image(first)
        y = first[:, image]
        for op in ops:
            y = op.restore(y, self.call)
        whole = torch.cat([first[:, : image.start], y, first[:, image.stop :]], dim=1)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    @contextmanager
    def contexts(self) -> Iterator[None]:
        """The stage `context`: the layers of keys and values get what the ops make of their input,
        for this run. They are looked up now, since an adapter may have wrapped them."""
        handles = []
        made: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

        def change(index: int, x: Tensor) -> Tensor:
            if not made:
                both = (x, x)
                for op in self.stages["context"]:
                    both = op.context(*both, self.call)
                made.append((x, both))
            given, both = made[0]
            if given is not x:
                raise ValueError(
                    f"{label(self.stages['context'][0])} needs keys and values made of the same "
                    f"tokens, and {self.site.name!r} makes them of different ones; choose other "
                    "sites"
                )
            self._seen_context += 1
            return both[index]

        for index, role in enumerate(context_roles(self.site.kind)):
            layer = self.site.projection(role)
            handles.append(_before(layer, lambda x, index=index: change(index, x)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def projections(self) -> Iterator[None]:
        """The stage `project`: the ops change what the layers of keys and values make, for this
        run."""
        handles = []
        roles: tuple[Role, ...] = ("k", "v")

        def change(role: Role, x: Tensor, made: Tensor) -> Tensor:
            for op in self.stages["project"]:
                made = op.project(made, x, role=role, call=self.call)
            return made

        for role in roles:
            layer = self.site.projection(role)
            handles.append(_after(layer, partial(change, role)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _lengths(self) -> Lengths | None:
        x = self._argument(self.names[0])
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            return None
        name = text_argument(self.names)
        text = None if name is None else self._argument(name)
        own = isinstance(text, Tensor) and text.ndim == 3 and text is not x
        stream = x.shape[1] if x.ndim == 3 else x.shape[-2] * x.shape[-1]
        words = text.shape[1] if isinstance(text, Tensor) and own else None
        return Lengths(stream=stream, text=words, rows=x.shape[0])

    def _image(self, x: Tensor) -> slice:
        """The image in a stream that may also hold the text."""
        if self.site.kind != "joint":
            return slice(0, x.shape[1])
        call = self.call
        found = spans_of(x.shape[1], site=self.site, ctx=call.ctx, lengths=call.lengths, keys=False)
        return found.image

    def _argument(self, name: str) -> Any:
        index = self.names.index(name)
        return self.args[index] if index < len(self.args) else self.kwargs.get(name)

    def _replace(self, x: Tensor) -> None:
        """Puts other tokens in the place of the layer's first argument."""
        if self.args:
            self.args = (x, *self.args[1:])
        else:
            self.kwargs[self.names[0]] = x

    def _refuse_positions(self, op: Any) -> None:
        """Positions are those of all tokens: with fewer, each would get another's."""
        given = dict(zip(self.names, self.args, strict=False)) | self.kwargs
        words = ("rot", "rope", "freq")
        placed = [name for name in given if any(word in name for word in words)]
        if any(given[name] is not None for name in placed) or self.site.kind == "joint":
            raise ValueError(
                f"{label(op)} changes the number of tokens, and {self.site.name!r} gives each its "
                "position by its number; choose other sites"
            )


def _before(layer: nn.Module, change: Any) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    return layer.register_forward_pre_hook(hook)


def _after(layer: nn.Module, change: Any) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
        return cast(Tensor, change(args[0], made))

    return layer.register_forward_hook(hook)


@cache
def _parameters(kind: type) -> tuple[str, ...]:
    """Names of the arguments of a layer's forward, without `self`."""
    forward: Any = kind.__dict__.get("forward") or getattr(kind, "forward")  # noqa: B009
    return tuple(inspect.signature(forward).parameters)[1:]
