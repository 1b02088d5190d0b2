"""Encodings that are kept: exactly what was encoded, and never a damaged or another prompt's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.data import kept_tensors, text_cache
from trainer.data.text_cache import TextCache


class Encoder:
    """Tensors of its own for each prompt; asked: the prompts in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> dict[str, torch.Tensor]:
        self.asked.append(prompt)
        draw = torch.Generator().manual_seed(len(prompt))
        tokens = torch.randn(1, len(prompt) + 1, 8, generator=draw)
        return {"tokens": tokens.bfloat16(), "mask": torch.ones(1, len(prompt) + 1)}


def same(found: text_cache.Encoding, prompt: str) -> bool:
    wanted = Encoder()(prompt)
    kinds = {name: value.dtype for name, value in found.items()}
    assert kinds == {"tokens": torch.bfloat16, "mask": torch.float32}
    return all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_prompt_is_encoded_once(tmp_path: Path) -> None:
    encode = Encoder()
    cache = TextCache(tmp_path / "key", encode)
    assert "a fox" not in cache and not encode.asked
    for prompt in ("a fox", "", "a fox"):
        assert same(cache[prompt], prompt)
    assert encode.asked == ["a fox", ""]
    again = TextCache(tmp_path / "key", encode)
    assert "a fox" in again and same(again["a fox"], "a fox") and same(again[""], "")
    assert TextCache(tmp_path / "other", encode)["a fox"] is not None
    assert encode.asked == ["a fox", "", "a fox"]


@pytest.mark.parametrize("damage", ["cut", "altered", "other", "moved"])
def test_what_is_not_what_was_written_is_made_anew(damage: str, tmp_path: Path) -> None:
    encode = Encoder()
    folder = tmp_path / "key"
    cache = TextCache(folder, encode)
    _ = cache["a fox"], cache["a cat"]
    path, other = (kept_tensors.tensors_file(folder, prompt) for prompt in ("a fox", "a cat"))
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-9])
    if damage == "altered":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    if damage == "other":
        path.write_bytes(other.read_bytes())
    if damage == "moved":
        folder = folder.rename(tmp_path / "renamed")
    again = TextCache(folder, encode)
    assert "a fox" not in again and same(again["a fox"], "a fox")
    assert encode.asked.count("a fox") == 2
    assert same(TextCache(folder, encode)["a fox"], "a fox") and encode.asked.count("a fox") == 2


def test_memory_has_those_that_were_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_cache, "REMEMBERED", 400)  # bytes; one of these takes 120
    cache = TextCache(tmp_path / "key", Encoder())
    for prompt in ("fox 1", "fox 2", "fox 3", "fox 1", "fox 4"):
        assert same(cache[prompt], prompt)
    assert list(cache.remembered) == ["fox 3", "fox 1", "fox 4"]
    assert same(cache["fox 2"], "fox 2") and cache.bytes <= 400


def test_files_end_where_their_room_does(tmp_path: Path) -> None:
    limited = TextCache(tmp_path / "few", Encoder(), room=150)  # bytes; one of these takes 120
    assert all(same(limited[prompt], prompt) for prompt in ("a fox", "a cat", "a fox"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1 and "a cat" in limited


def test_memory_alone_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encode = Encoder()
    cache = TextCache(None, encode)
    assert "a fox" not in cache
    assert all(same(cache[prompt], prompt) for prompt in ("a fox", "", "a fox"))
    assert encode.asked == ["a fox", ""] and "a fox" in cache
    assert not list(tmp_path.iterdir())
