"""Rows of new words in a text encoder's table."""

from __future__ import annotations

from typing import Any

import torch
from flow_folders import clip_parts
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.ops.adapters.token_rows import extend


class Largest(TorchDispatchMode):
    """Notes the most numbers that one reduction reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mean, torch.ops.aten.std, torch.ops.aten.var):
            self.read = max(self.read, args[0].numel())
        return func(*args, **(kwargs or {}))


def started(plan: bool) -> tuple[torch.Tensor, int]:
    """The row of a new word over a table of ones, of which a plan has one in memory alone; and how
    much of the table was read for it."""
    tokenizer, encoder = clip_parts()
    table = encoder.get_input_embeddings()
    ones = torch.ones(()) if plan else torch.ones(table.weight.shape)
    table.weight.data = ones.expand(table.weight.shape)
    with Largest() as largest:
        extend(encoder, tokenizer, ["<v1>"], [None])
    return encoder.get_input_embeddings().stacked().detach(), largest.read


def test_a_plan_does_not_read_a_table_that_is_one_number() -> None:
    """Which takes a second for T5's, and gives the same."""
    wanted, every = started(plan=False)
    found, read = started(plan=True)
    assert torch.equal(found, wanted) and read < every // 100
