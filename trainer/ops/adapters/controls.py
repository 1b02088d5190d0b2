"""A LoRA layer whose tokens attend to each other: the controls of PEFT with Controls."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora.layer import Linear
from torch import Tensor

from trainer.kernels.softmax import sdpa


def cross_attention_of(y: Tensor) -> Tensor:
    """CPA(y)_j = sum_i softmax_i(<y_j, y_i>) y_i over the tokens of each row, y (b, ..., d). A row
    without tokens, (b, d), is one token: CPA(y) = y."""
    tokens = y.reshape(len(y), 1, -1, y.shape[-1])  # b 1 n d
    return sdpa(tokens, tokens, tokens, scale=1.0).reshape(y.shape)


class ControlledLinear(Linear):
    """x (b, n, c) -> W0 x + g(x) with g(x) = y + CPA(y), y = scale * B A x (b, n, d)."""

    unfoldable = "methods.controls lets tokens attend to each other there; use the adapter as it is"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        (name,) = self.active_adapters
        down: Any = self.lora_A[name]
        low = down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype)))
        y = self.lora_B[name](low) * self.scaling[name]
        return result + (y + cross_attention_of(y)).to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise ValueError(self.unfoldable)
