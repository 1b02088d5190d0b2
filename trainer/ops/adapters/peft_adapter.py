"""What single kinds of peft's adapters need beyond being put on a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.deft.layer import DeftLinear
from torch import Tensor
from torch.nn.functional import linear

NO_BIAS = "methods.peft_adapter of type beft adds a bias there, and the layer has none to add it to"


class ExactDeft(DeftLinear):
    """peft's layer, W0 x + Q (s R - right^T W0) x, computed so that nothing is added at the start.

    peft subtracts Q right^T W0 x and adds Q s R x, which differ by rounding where R = right^T W0.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)."""
        base: Tensor = self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.deft_P]
        if self.disable_adapters or self.merged or not active:
            return base
        with torch.autocast(x.device.type, enabled=False):
            result, rows = base.float(), x.float()
            for name in active:
                left, _ = self._project(self.deft_P[name], name)
                inner = -self._merge_factor(name)
                if not self.deft_para[name]:
                    inner = self.deft_R[name].float() * self.deft_scaling[name] + inner
                result = result + linear(linear(self.deft_dropout[name](rows), inner), left)
        return result.to(base.dtype)


def prepare_layers(kind: str, layers: Sequence[Any], name: str) -> None:
    """Makes the adapters `name` of that kind on peft's layers start at the base model, and marks
    those that no weight can hold."""
    for layer in layers:
        if kind == "deft":
            _start_exactly(layer, name)
        if kind == "beft" and layer.get_base_layer().bias is None:
            layer.unfoldable = NO_BIAS


@torch.no_grad()
def _start_exactly(layer: Any, name: str) -> None:
    """R again from P in float32: peft has rounded both to the precision of W0."""
    layer.__class__ = ExactDeft
    layer.deft_P[name].data = layer.deft_P[name].data.float()
    if name in layer.deft_R:
        layer.deft_R[name].data = layer.deft_R[name].data.float()
