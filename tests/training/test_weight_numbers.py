"""Norms of weights and of updates against plain sums."""

from __future__ import annotations

import pytest
import torch

from trainer.training import weight_numbers
from trainer.training.weight_numbers import block_norms, block_of, sampled, update_ratio


def test_an_update_is_measured_over_all_tensors_together() -> None:
    before = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])}
    after = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([6.0])}
    kept = sampled(before)
    before["a"].zero_()  # the copies do not follow
    assert update_ratio(kept, after) == pytest.approx(5**0.5 / 5)
    assert update_ratio([torch.zeros(2)], {"a": torch.ones(2)}) is None
    assert update_ratio([], {}) is None


def test_of_a_large_tensor_values_all_over_it_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_numbers, "SAMPLED", 10)
    (found,) = sampled({"a": torch.arange(100.0).reshape(10, 10)})
    assert found.tolist() == [float(i) for i in range(0, 100, 10)]
    (few,) = sampled({"a": torch.arange(15.0)})
    assert len(few) == 15  # never fewer than asked for


def test_norms_are_summed_by_block() -> None:
    values = {
        "unet.down_blocks.1.attentions.0.to_q.lora_A": torch.tensor([3.0]),
        "unet.down_blocks.1.attentions.1.to_q.lora_A": torch.tensor([[4.0]], dtype=torch.bfloat16),
        "unet.down_blocks.11.attentions.0.to_q.lora_A": torch.tensor([1.0]),
        "unet.mid_block.attentions.0.to_q.lora_A": torch.tensor([2.0]),
        "text_encoder.embed.weight": torch.tensor([2.0, 2.0]),
    }
    assert block_norms(values) == pytest.approx(
        {
            "unet.down_blocks.1": 5.0, "unet.down_blocks.11": 1.0,
            "unet.mid_block.attentions.0": 2.0, "text_encoder.embed": 8**0.5,
        }
    )  # fmt: skip
    assert block_of("transformer.transformer_blocks.7.attn.to_q") == (
        "transformer.transformer_blocks.7"
    )
    assert block_norms({}) == {}
