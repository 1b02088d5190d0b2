"""TF-ICON's composed scores against a loop, its start and background, and its refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edit_checks import (
    DIM,
    UNGUIDED_SOURCE,
    apart,
    call_at,
    drawn,
    edited,
    outputs,
    predicted,
    qkv,
    site_of,
    some_trajectory,
)

from trainer.attention.bank import FeatureBank
from trainer.ops.tf_icon import ComposedAttention, Composition, box_of, exceptional

OWN, PROMPT = "a red background", "a fox on a red background"
OBJECT = (0, 1, 4)  # of a 4 x 4 grid; the box around it is 0, 1, 4 and 5
BOX = (0, 1, 4, 5)


def mask() -> torch.Tensor:
    found = torch.zeros(1, 1, 16, 16)
    found[..., :4, :8] = found[..., :8, :4] = 1
    return found


def test_each_block_of_scores_is_that_of_the_paper(tiny: Any) -> None:
    op = ComposedAttention(Composition("tf_icon", "self", steps=(0.0, 1.0)), FeatureBank())
    op.mask = mask()
    made, kept, site = qkv(3, 16), qkv(1, 16), site_of(tiny)
    op.bank.put(0, site.name, {"q": kept[0], "k": kept[1]})
    found = outputs(op, made, call_at(site, groups=UNGUIDED_SOURCE))
    scale = DIM**-0.5
    source, reference = (x[1] for x in made[:2]), (x[0] for x in kept[:2])
    q_s, k_s = source
    q_r, k_r = reference
    for row, group in ((0, "target/uncond"), (2, "target/cond")):
        q, k, v = (x[row] for x in made)
        scores = torch.zeros(2, 16, 16)
        for i in range(16):
            for j in range(16):
                if i not in BOX or j not in BOX:
                    pair = q_s[:, i], k_s[:, j]
                elif i in OBJECT and j in OBJECT:
                    pair = q_r[:, i], k_r[:, j]
                elif j in OBJECT:
                    pair = q[:, i], k_r[:, j]
                elif i in OBJECT:
                    pair = q[:, j], k_r[:, i]
                else:
                    pair = q[:, i], k[:, j]
                scores[:, i, j] = (pair[0] * pair[1]).sum(-1) * scale
        torch.testing.assert_close(found[group][0], scores.softmax(-1) @ v)
    plain = (q_s @ k_s.transpose(-2, -1) * scale).softmax(-1) @ made[2][1]
    torch.testing.assert_close(found["source/cond"][0], plain)


def test_a_box_is_the_rectangle_around_the_mask() -> None:
    found = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert not box_of(found).any()
    found[0, 0, 1, 2] = found[0, 0, 2, 0] = True
    assert box_of(found)[0, 0].int().tolist() == [[0] * 4, [1, 1, 1, 0], [1, 1, 1, 0], [0] * 4]


def test_every_token_is_told_the_same(tiny: Any) -> None:
    condition = tiny.encode_prompts(["a fox", "a cat"])
    found = exceptional(condition).tokens
    assert found is not None and found.shape == condition.tokens.shape
    assert torch.equal(found, condition.tokens[:, -1:].expand_as(found))


def test_the_background_stays_outside_the_box_and_the_object_begins_inside(tiny: Any) -> None:
    told = Composition("tf_icon", "self", background_until=0.5)
    op = ComposedAttention(told, FeatureBank())
    op.mask = mask()
    x_t, x_s = drawn(1, 3, 8, 8, seed=1), drawn(1, 3, 8, 8, seed=2)
    for step in range(4):
        found = op.after_step(x_t, predicted(x_t, x_s), call_at(site_of(tiny), step).ctx)
        inside = found[..., :4, :4]
        assert torch.equal(inside, x_t[..., :4, :4])
        assert torch.equal(found[..., 4:], (x_s if step < 2 else x_t)[..., 4:])

    noise: Any = SimpleNamespace(reference={0: x_s})
    begun, first = op.start(x_t, noise)
    assert first == 0
    assert torch.equal(begun[..., :2, :4], x_s[..., :2, :4])
    assert torch.equal(begun[..., 4:, :], x_t[..., 4:, :])
    beside = begun[..., 2:4, 2:4]
    assert apart(beside, x_t[..., 2:4, 2:4]) > 0.1 and apart(beside, x_s[..., 2:4, 2:4]) > 0.1


def given(model: Any) -> dict[str, Any]:
    known = some_trajectory(model)
    other = {step: x.flip(-1) for step, x in known.items()}
    return {
        "source": OWN, "inverted": True, "trajectory": known, "reference": other,
        "masks": {"source": mask()},
    }  # fmt: skip


def test_a_composition_keeps_the_background_and_shows_the_reference(tiny: Any, dit: Any) -> None:
    for model in (tiny, dit):
        told = given(model)
        base, source = edited(model, {"tf_icon": {"background_until": 1.0}}, PROMPT, **told)
        assert apart(base[..., 4:], source[..., 4:]) == 0
        told["reference"] = {step: x + 0.5 for step, x in told["reference"].items()}
        other, _ = edited(model, {"tf_icon": {"background_until": 1.0}}, PROMPT, **told)
        assert apart(base[..., :4, :4], other[..., :4, :4]) > 1e-3
        assert not any(hosted.ops for hosted in model.host.processors.values())
    for options in ({"steps": None}, {"exceptional": False}, {"background_until": 0.0}):
        found, _ = edited(tiny, {"tf_icon": options}, PROMPT, **given(tiny))
        whole, _ = edited(tiny, {"tf_icon": {}}, PROMPT, **given(tiny))
        assert apart(found, whole) > 1e-6, options


def test_what_is_missing_is_refused(tiny: Any) -> None:
    for changes, says in (
        ({"masks": {}}, r"methods\.tf_icon: it needs the mask of the object"),
        ({"masks": {"source": 0 * mask()}}, r"methods\.tf_icon: the mask has no place that is wh"),
        ({"reference": {}}, r"methods\.tf_icon puts a second picture into its source, and there"),
        ({"trajectory": {}}, r"methods\.tf_icon reads the inversion of its source, and there is"),
    ):
        with pytest.raises(ValueError, match=says):
            edited(tiny, {"tf_icon": {}}, PROMPT, **(given(tiny) | changes))
