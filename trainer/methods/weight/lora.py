"""LoRA: a low-rank matrix is trained beside each frozen layer, h = W0 x + alpha / rank * B A x.

Hu et al., arXiv 2106.09685, equation 3; A random, B zero, so training starts at the base model.
Other starts than the paper's: `gaussian` (A normal with deviation 1 / rank, as diffusers'
trainers), `pissa` (A and B from the largest singular vectors of W0, arXiv 2404.02948), `olora`
(from its QR decomposition, arXiv 2406.01775), `eva` (A from the directions in which the inputs vary
most, arXiv 2410.07170, with the same rank everywhere). The papers of `pissa` and `olora` subtract
the start from W0; here W0 stays as it is and a frozen second adapter subtracts the start, which
gives the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import LowRank, edit_of

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.adapters.inject import Target

LORA_START = "lora_start"


class Lora(LowRank):
    """Options of low rank, and where A and B start."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "LoRA, MotionLoRA"
    paper: ClassVar[str] = "arXiv 2106.09685"

    init: Literal["default", "gaussian", "pissa", "olora", "eva"] = Field(
        "default",
        description="where A and B start: default is the paper's, A uniform and B zero; gaussian "
        "draws A normal with deviation 1 / rank; pissa and olora start from W0 by SVD (arXiv "
        "2404.02948) or QR (2406.01775); eva takes A from the directions in which the inputs vary "
        "most (2410.07170)",
    )

    @model_validator(mode="after")
    def _starts_apart(self) -> Lora:
        if self.init in ("pissa", "olora") and self.dropout > 0:
            raise ValueError(
                f"init={self.init} starts with B A subtracted from W0, which dropout would leave "
                "standing; set dropout=0"
            )
        return self

    @property
    def reads_weights(self) -> bool:
        return self.init in ("pissa", "olora")

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.adapters.inject import inject

        targets = self.targets(model)
        self._refuse(model, targets)
        kept: tuple[str, ...] = ()
        if self.init in ("pissa", "olora"):
            trains, kept = self._subtracted(model, targets)
        else:
            start = "gaussian" if self.init == "gaussian" else True
            config = partial(self.config, init_lora_weights=start)
            trains = inject(model, targets, config, owner=self.name)
        prepare = self._eva(model, targets) if self.init == "eva" else None
        return edit_of(targets, trains, kept, prepare=prepare)

    def _refuse(self, model: AttentionModel, targets: Sequence[Target]) -> None:
        """Raises ValueError where a layer has no matrix to start from."""
        from torch import nn

        from trainer.backbones.four_bits import is_packed
        from trainer.ops.adapters.inject import base_layer, layer_of

        for target in targets:
            layer = base_layer(layer_of(model, target))
            if self.init in ("pissa", "olora", "eva") and not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"init={self.init} is for linear layers, and {target.path} is a convolution; "
                    "set init=default, or leave it out"
                )
            if self.init in ("pissa", "olora") and is_packed(layer):
                raise ValueError(
                    f"init={self.init} starts from W0 itself, and methods.nf4 stores that of "
                    f"{target.path} in 4 bits; set init=default, or leave it out with "
                    "methods.nf4.skip"
                )

    def _subtracted(
        self, model: AttentionModel, targets: Sequence[Target]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Starts from W0 itself; the names that train, and those of the frozen start."""
        import torch

        from trainer.ops.adapters.inject import add_copy, base_layer, inject, layer_of

        def weight_of(target: Target) -> Any:
            return base_layer(layer_of(model, target)).weight

        weights = [weight_of(target).detach().clone() for target in targets]
        config = partial(self.config, init_lora_weights=self.init)
        trains = inject(model, targets, config, owner=self.name)
        kept: list[str] = []
        for target, weight in zip(targets, weights, strict=True):
            with torch.no_grad():
                weight_of(target).copy_(weight)
            kept += add_copy(
                layer_of(model, target), self.name, LORA_START, sign=-1, path=target.path
            )
        return trains, tuple(kept)

    def _eva(
        self, model: AttentionModel, targets: Sequence[Target]
    ) -> Callable[[Callable[[], None]], None]:
        def prepare(run: Callable[[], None]) -> None:
            import torch

            from trainer.ops.adapters.inject import layer_of
            from trainer.ops.adapters.input_moments import input_moments, leading

            layers = {target.path: layer_of(model, target) for target in targets}
            moments = input_moments(layers, run)
            with torch.no_grad():
                for path, layer in layers.items():
                    matrix = layer.lora_A[self.name].weight
                    matrix.copy_(leading(moments[path], len(matrix)))

        return prepare
