"""Norms of weights and of updates against plain sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

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


def test_of_sharded_weights_all_parts_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank, whose part is the whole: what would be summed over the ranks are the squares of
    the sharded tensors alone."""
    told: list[list[float]] = []

    def summed(own: torch.Tensor) -> torch.Tensor:
        told.append(own.tolist())
        return 4 * own  # as of four ranks with parts like this one's

    monkeypatch.setattr(weight_numbers, "summed", summed)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        part = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)])
        values = {"a.b.1.w": part, "a.b.2.w": torch.tensor([2.0])}
        assert block_norms(values) == {"a.b.1": 10.0, "a.b.2": 2.0}
        assert told == [[25.0, 4.0]]
        before = [torch.zeros(2), torch.tensor([1.0])]
        assert update_ratio(before, values) == pytest.approx((4 * 25 + 1) ** 0.5)
    finally:
        torch.distributed.destroy_process_group()
