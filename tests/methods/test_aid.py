"""AID's attention against a loop, its shares and arcs, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_checks import HOW, apart, call_at, drawn, latents, loop_attention, outputs, qkv, site_of

from trainer.attention.condition import Condition
from trainer.attention.rows import Rows
from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample
from trainer.methods.apply import apply_methods
from trainer.ops.aid import InterpolatedAttention, Interpolation
from trainer.ops.editing.between import beta_shares, slerp

GROUPS = ("target/uncond", "target/cond")


Pair = tuple[torch.Tensor, torch.Tensor]


def seen(q: torch.Tensor, end: Pair, own: Pair | None) -> torch.Tensor:
    """What queries see of the keys and values of an end, with their own appended."""
    if own is not None:
        end = torch.cat([end[0], own[0]], 1), torch.cat([end[1], own[1]], 1)
    return loop_attention(q, *end)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["inner", "outer"])
def test_rows_between_look_at_both_ends(way: str, fused: bool, tiny: Any) -> None:
    op = InterpolatedAttention(Interpolation("aid", "self", way=way, fused=fused))
    made = qkv(2 * 4, 9, keys=5)
    for step, inside in ((0, True), (2, False)):
        found = outputs(op, made, call_at(site_of(tiny), step, groups=GROUPS, count=4))
        q, k, v = (x[4:] for x in made)
        for row, share in enumerate([0, 1 / 3, 2 / 3, 1]):
            own = (k[row], v[row])
            if row in (0, 3) or not inside:
                wanted = loop_attention(q[row], *own)
            elif way == "outer":
                ends = [seen(q[row], (k[end], v[end]), own if fused else None) for end in (0, 3)]
                wanted = (1 - share) * ends[0] + share * ends[1]
            else:
                keys, values = ((1 - share) * x[0] + share * x[3] for x in (k, v))
                wanted = seen(q[row], (keys, values), own if fused else None)
            torch.testing.assert_close(found["target/cond"][row], wanted)
        for row in range(4):
            wanted = loop_attention(*(x[row] for x in made))
            torch.testing.assert_close(found["target/uncond"][row], wanted)


def test_shares_are_quantiles_of_the_prior() -> None:
    assert beta_shares(5, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    # Beta(2, 2): 3 x^2 - 2 x^3 = 1 / 4
    (low,) = beta_shares(5, 2.0)[1:2]
    assert 3 * low**2 - 2 * low**3 == pytest.approx(0.25, abs=1e-5)
    assert beta_shares(5, 2.0)[3] == pytest.approx(1 - low, abs=1e-6)
    assert beta_shares(3, 0.5) == pytest.approx([0, 0.5, 1], abs=1e-6)
    assert beta_shares(1, 1.0) == [0.0]
    far = beta_shares(5, 100.0)  # the ends, although nearly all of the mass is in the middle
    assert (far[0], far[-1]) == (0.0, 1.0) and 0.47 < far[1] < far[2] == pytest.approx(0.5)


def test_points_on_the_arc() -> None:
    one, other = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    half = slerp(one, other, 0.5)
    torch.testing.assert_close(half, torch.full((1, 1, 2), 3 * 0.5**0.5))
    third = slerp(one, other, 1 / 3)
    torch.testing.assert_close(third, torch.tensor([[[3 * 0.75**0.5, 1.5]]]))
    assert torch.equal(slerp(one, one, 0.3), one)


def test_the_ends_are_what_their_prompts_give(tiny: Any, dit: Any) -> None:
    for model in (tiny, dit):
        ends = [latents(model, [prompt]) for prompt in ("a fox", "a cat")]
        apply_methods(model, methods_of({"aid": {"sites": "self | cross"}}), trains=False)
        found = latents(model, ["a fox", "a fox", "a cat"])
        model.sampling_hooks.clear()
        for row, plain in ((0, ends[0]), (2, ends[1])):
            torch.testing.assert_close(found[row : row + 1], plain, rtol=0, atol=1e-3)
        assert apart(found[1], found[0]) > 1e-3 and apart(found[1], found[2]) > 1e-3


def test_text_lies_on_the_line_and_rows_between_see_the_tokens_of_both_ends() -> None:
    """Of 4 pictures, in the conditional half alone."""
    op = InterpolatedAttention(Interpolation("aid", "self"))
    tokens, pooled = drawn(8, 5, 3), drawn(8, 2, seed=1)
    mask = torch.zeros(8, 5, dtype=torch.int64)
    for row, length in enumerate([1, 1, 1, 1, 2, 2, 2, 4]):
        mask[row, :length] = 1
    told = Condition(tokens=tokens, pooled=pooled, mask=mask)
    found = op.tells(told, Rows.of(GROUPS, 4))
    for had, has in ((tokens, found.tokens), (pooled, found.pooled)):
        assert has is not None and torch.equal(has[:4], had[:4])
        for row, share in enumerate([0, 1 / 3, 2 / 3, 1]):
            wanted = (1 - share) * had[4] + share * had[7]
            torch.testing.assert_close(has[4 + row], wanted)
    assert found.mask is not None and found.mask.sum(1).tolist() == [1, 1, 1, 1, 2, 4, 4, 4]
    assert mask.sum(1).tolist() == [1, 1, 1, 1, 2, 2, 2, 4]


def test_without_a_step_no_attention_is_changed(tiny: Any) -> None:
    found = []
    for steps in (None, (0.0, 1.0)):
        apply_methods(tiny, methods_of({"aid": {"steps": steps}}), trains=False)
        found.append(latents(tiny, ["a fox", "a fox", "a cat"]))
        tiny.sampling_hooks.clear()
    assert apart(found[0][1], found[1][1]) > 1e-3 and apart(found[0][1], found[0][0]) > 1e-3
    assert apart(found[0][2], found[1][2]) < 1e-3


def test_one_prompt_has_nothing_between(tiny: Any) -> None:
    apply_methods(tiny, methods_of({"aid": {}}), trains=False)
    with pytest.raises(ValueError, match=r"methods\.aid: it makes pictures between two, and there"):
        sample(tiny, ["a fox"], [0], settings=HOW)
