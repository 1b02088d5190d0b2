"""Takes every softmax attention call that is made in this thread inside a `with`, by whichever
name and module it was imported.

    with AttentionCalls(take):
        layer(...)      # F.scaled_dot_product_attention(q, k, v, ...) is take(q, k, v, ...)

`dispatch_attention_fn` of diffusers ends in the same call. Nothing of torch or diffusers is
replaced: another model, another thread, and what `take` itself calls, are untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionCalls(TorchFunctionMode):
    """take: called in the place of the attention function, with its arguments."""

    def __init__(self, take: Callable[..., Tensor]) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        called = self.take if function is F.scaled_dot_product_attention else function
        return called(*args, **(kwargs or {}))
