"""The bank of features: by step and place, in bounded memory; and the residual blocks of U-Nets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.bank import FeatureBank
from trainer.attention.context import StepContext, use
from trainer.attention.residual_blocks import ResidualBlock, hook_residuals, residual_blocks


@pytest.mark.parametrize("offload", [False, True])
def test_features_come_back_as_they_were(offload: bool) -> None:
    bank = FeatureBank(offload=offload)
    rows = torch.arange(6.0).view(2, 3)
    bank.put(3, "up", {"k": rows[:1], "v": rows[1:]})
    rows.zero_()  # what was kept is a copy
    found = bank.get(3, "up", like=torch.zeros((), dtype=torch.float64))
    assert found["k"].tolist() == [[0, 1, 2]] and found["v"].tolist() == [[3, 4, 5]]
    assert found["k"].dtype == torch.float64
    assert (3, "up") in bank and (2, "up") not in bank and list(bank) == [(3, "up")]
    bank.put(3, "up", {"k": rows})
    assert bank.get(3, "up", like=rows).keys() == {"k"} and bank.bytes == 24
    bank.clear()
    assert len(bank) == bank.bytes == 0


def test_more_than_the_limit_is_refused_and_not_kept() -> None:
    bank = FeatureBank(limit=1.5, most_tokens=16)
    large = torch.zeros(1 << 18)  # a megabyte
    bank.put(0, "up", {"k": large})
    bank.put(0, "up", {"k": large})  # in its place
    with pytest.raises(ValueError, match=r"features of 2 layers and steps take 2\.0 MB.*is 1\.5; "):
        bank.put(1, "up", {"k": large})
    assert bank.bytes == 1 << 20 and len(bank) == 1
    assert bank.takes(16) and not bank.takes(17) and FeatureBank().takes(1 << 20)


def test_what_was_not_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing was kept of 'mid' at step 4; sample in as many"):
        FeatureBank().get(4, "mid", like=torch.zeros(1))


def test_residual_blocks_are_chosen_as_sites_are(tiny: Any) -> None:
    every = [block.name for block in residual_blocks(tiny.denoiser, "depth>=0")]
    assert every[0] == "down_blocks.0.resnets.0" and every[-1] == "up_blocks.1.resnets.1"
    places = [block.place for block in residual_blocks(tiny.denoiser, "depth>=0")]
    assert places == sorted(places, key=("down", "mid", "up").index)
    up = residual_blocks(tiny.denoiser, "up & /1")
    assert [block.name for block in up] == ["up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]
    assert up[-1].depth == 1
    with pytest.raises(ValueError, match=r"'down & /9' matches no residual block; there are down_"):
        residual_blocks(tiny.denoiser, "down & /9")


def test_a_transformer_has_none(dit: Any) -> None:
    with pytest.raises(ValueError, match="has no residual blocks, as U-Nets have; leave their"):
        residual_blocks(dit.denoiser, "up")


def test_what_a_block_makes_is_replaced_until_the_handle_is_removed(tiny: Any) -> None:
    (block,) = residual_blocks(tiny.denoiser, "name:up_blocks.1.resnets.1")
    seen: list[tuple[str, int]] = []

    def change(made: Tensor, own: ResidualBlock, ctx: StepContext) -> Tensor:
        seen.append((own.name, ctx.step))
        return made * 0

    x, text = torch.randn(1, 8, 8, 8), torch.randn(1, 4, 128)

    def run() -> Tensor:
        with torch.no_grad(), use(StepContext(2, 4, torch.tensor(5.0))):
            out: Tensor = tiny.denoiser(x, torch.tensor(5.0), encoder_hidden_states=text).sample
        return out

    before = run()
    tiny.host  # noqa: B018  attached at its first use
    handles = hook_residuals(tiny.host, [block], change)
    after = run()
    assert seen == [(block.name, 2)] and not torch.equal(before, after)
    for handle in handles:
        handle.remove()
    assert torch.equal(run(), before)
