"""The condition as a record: by clip and by frame, by rows, and through a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trainer.attention.condition import Condition


def made(rows: int = 4) -> Condition:
    parts = (
        torch.randn(rows, *shape, generator=torch.Generator().manual_seed(len(shape)))
        for shape in ((3, 5), (7,), (2, 6), (1, 4, 4))
    )
    tokens, pooled, image_tokens, channels = parts
    return Condition(tokens, pooled=pooled, image_tokens=image_tokens, channels=channels)


def test_what_is_not_there_stays_none() -> None:
    condition = made()
    assert list(condition.tensors()) == ["tokens", "pooled", "image_tokens", "channels"]
    assert condition.rows(slice(0, 2)).mask is None
    assert Condition().tensors() == {}


def test_frames_of_a_clip_are_adjacent_and_share_it() -> None:
    condition = made(2)
    clips = condition.per_frame(3)
    for name, value in condition.tensors().items():
        found = clips.tensors()[name]
        assert len(found) == 6
        assert all(torch.equal(found[row], value[row // 3]) for row in range(6))
    assert condition.per_frame(1) is condition
    for name, value in clips.per_clip(3).tensors().items():
        assert torch.equal(value, condition.tensors()[name])


def test_rows_are_those_of_every_field() -> None:
    condition = made()
    part = condition.rows(slice(1, 3))
    for name, value in condition.tensors().items():
        assert torch.equal(part.tensors()[name], value[1:3])


def test_it_moves_as_a_whole() -> None:
    moved = made().to(torch.device("meta"))
    assert {value.device.type for value in moved.tensors().values()} == {"meta"}


def test_it_is_the_same_from_a_cache(tmp_path: Path) -> None:
    condition = made()
    save_file(condition.tensors(), tmp_path / "condition.safetensors")
    again = Condition(**load_file(tmp_path / "condition.safetensors"))
    assert again.tensors().keys() == condition.tensors().keys()
    for name, value in condition.tensors().items():
        assert torch.equal(again.tensors()[name], value)
