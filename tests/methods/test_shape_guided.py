"""Inside-outside attention against loops over tokens, the background, and the refusals."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import pytest
import torch
from edit_checks import (
    HEADS,
    apart,
    call_at,
    drawn,
    edited,
    latents,
    predicted,
    site_of,
    some_trajectory,
)

from trainer.ops.shape_guided import STRENGTHS, InsideOutside, InsideOutsideAttention

OWN, PROMPT = "a fox on a red background", "a cat on a red background"
INSIDE = (0, 1, 4, 5)  # of a 4 x 4 grid


def mask() -> torch.Tensor:
    found = torch.zeros(1, 1, 16, 16)
    found[..., :8, :8] = 1
    return found


def attention(**options: Any) -> InsideOutsideAttention:
    op = InsideOutsideAttention(InsideOutside("shape_guided", "self | cross", **options))
    op.mask = mask()
    op.inside = torch.tensor([[0.0, 0, 1, 0, 0, 0]])  # begin, a, cat, here, end, padding
    op.outside = torch.tensor([[0.0, 1, 0, 1, 0, 0]])
    return op


def test_words_are_seen_on_their_side(tiny: Any) -> None:
    op, probs = attention(), drawn(4, HEADS, 16, 6).softmax(-1)
    found = op.probs(probs, call_at(site_of(tiny, "cross")))
    assert torch.equal(found[:3], probs[:3])
    for i in range(16):
        m = 1.0 if i in INSIDE else 0.0
        for j, factor in enumerate([1, 1 - m, m, 1 - m, 0, 0]):
            assert torch.equal(found[3, :, i, j], probs[3, :, i, j] * factor)


@pytest.mark.parametrize("schedule", STRENGTHS)
def test_tokens_see_their_own_side(schedule: str, tiny: Any) -> None:
    op, probs = attention(schedule=schedule), drawn(4, HEADS, 16, 16).softmax(-1)
    found = op.probs(probs, call_at(site_of(tiny), 1))
    strength = {
        "exp": 0.95**12.5, "linear": 0.75, "cosine": cos(pi / 8), "constant": 1.0,
    }[schedule]  # fmt: skip
    assert torch.equal(found[[0, 2]], probs[[0, 2]])
    for row in (1, 3):
        for i in range(16):
            for j in range(16):
                factor = 1.0 if (i in INSIDE) == (j in INSIDE) else 1 - strength
                torch.testing.assert_close(found[row, :, i, j], probs[row, :, i, j] * factor)


def test_outside_the_mask_the_source_stays(tiny: Any) -> None:
    op, x_t, x_s = attention(), drawn(1, 3, 8, 8), drawn(1, 3, 8, 8, seed=2)
    found = op.after_step(x_t, predicted(x_t, x_s), call_at(site_of(tiny)).ctx)
    assert torch.equal(found[..., :4, :4], x_t[..., :4, :4])
    found[..., :4, :4] = x_s[..., :4, :4]
    assert torch.equal(found, x_s)
    empty = attention()
    empty.mask = torch.zeros(1, 1, 16, 16)
    assert torch.equal(empty.after_step(x_t, predicted(x_t, x_s), call_at(site_of(tiny)).ctx), x_s)
    free = attention(background=False)
    assert free.after_step(x_t, predicted(x_t, x_s), call_at(site_of(tiny)).ctx) is x_t


@pytest.mark.parametrize("inverted", [False, True])
def test_an_edit_is_inside_its_mask(inverted: bool, tiny: Any, dit: Any) -> None:
    for model in (tiny, dit):
        known = some_trajectory(model) if inverted else {}
        found, source = edited(
            model, {"shape_guided": {}}, PROMPT, source=OWN, masks={"source": mask()},
            trajectory=known, inverted=inverted,
        )  # fmt: skip
        plain = known[4] if inverted else latents(model, [OWN])
        torch.testing.assert_close(source, plain, rtol=0, atol=1e-3)
        assert apart(found[..., 4:], source[..., 4:]) == 0
        assert apart(found[..., :4, :4], source[..., :4, :4]) > 1e-3


def test_what_does_not_fit_is_refused(tiny: Any) -> None:
    for options, prompt, masks, says in (
        ({}, PROMPT, {}, r"it needs the mask of the object; give mask="),
        (
            {},
            OWN,
            {"source": mask()},
            r"the prompt 'a .*' has no word that differs .* give methods\.",
        ),
        ({"inside": ["cow"]}, PROMPT, {"source": mask()}, r"the word 'cow' is not in the prompt"),
        ({"sites": "temporal"}, PROMPT, {"source": mask()}, r"matches no attention site"),
    ):
        prompts = (PROMPT, prompt)  # one of several is enough
        with pytest.raises(ValueError, match=rf"methods\.shape_guided: .*{says}"):
            edited(tiny, {"shape_guided": options}, *prompts, source=OWN, masks=masks)
