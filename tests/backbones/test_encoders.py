"""A backbone's encoders: each input by the encoder of its name, one condition of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder

from trainer.attention.condition import Condition


def test_prompts_are_the_condition_of_the_text_encoder(tiny: Any, dit: Any) -> None:
    with torch.no_grad():
        for backbone, masked in ((tiny, False), (dit, True)):
            condition = backbone.encode_prompts(["a fox", ""])
            tokens = backbone.tokens(["a fox", ""])
            mask = tokens.attention_mask if masked else None
            states = backbone.text_encoder(tokens.input_ids, attention_mask=mask)[0]
            torch.testing.assert_close(condition.tokens, states)
            assert (condition.mask is not None) == masked
            assert set(condition.tensors()) == {"tokens", "mask"} if masked else {"tokens"}


def test_a_further_encoder_adds_its_fields(tiny: Any) -> None:
    tiny.encoders["depth"] = lambda backbone, maps: {"channels": maps.mean(1, keepdim=True)}
    maps = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        condition = tiny.encode({"text": ["a fox", ""], "depth": maps})
        assert torch.equal(condition.tokens, tiny.encode_prompts(["a fox", ""]).tokens)
    assert torch.equal(condition.channels, maps.mean(1, keepdim=True))


def test_an_input_without_an_encoder_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="has no encoder for the input 'depth'; it has text"):
        tiny.encode({"text": [""], "depth": torch.zeros(1)})


def test_two_encoders_of_one_field_are_refused(tiny: Any) -> None:
    tiny.encoders["other"] = tiny.encoders["text"]
    with pytest.raises(ValueError, match="encoders of 'text' and 'other' both give tokens"):
        tiny.encode({"text": [""], "other": [""]})


@torch.no_grad()
def test_channels_are_joined_after_the_latents(
    tmp_path: Path, open_folder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's folder of this kind is refused; methods to come give the further channels."""
    monkeypatch.setattr("trainer.backbones.sd.check_channels", lambda *_, **__: None)
    backbone = open_folder(make_folder(tmp_path / "wide", in_channels=11))
    x_t, channels = torch.randn(2, 8, 8, 8), torch.randn(2, 3, 8, 8)
    t, text = torch.tensor([3, 700]), torch.randn(2, 32, 128)
    own = backbone.predict(x_t, t, Condition(text, channels=channels))
    wide = torch.cat([x_t, channels], dim=1)
    wanted = backbone.unet(wide, t, encoder_hidden_states=text).sample
    assert own.shape == x_t.shape and torch.equal(own, wanted)
