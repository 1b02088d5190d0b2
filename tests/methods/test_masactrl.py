"""MasaCtrl's attention against loops over queries, and its refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from edit_checks import (
    GROUPS,
    UNGUIDED_SOURCE,
    call_at,
    edited,
    joint_call,
    loop_attention,
    outputs,
    qkv,
    site_of,
)
from torch import Tensor

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.ops.editing.word_reader import SOURCE, TARGET, WordReader
from trainer.ops.masactrl import MutualSelfAttention, Sharing

OWN = "a fox on a red background"
SOURCES = dict.fromkeys(("source/uncond", "target/uncond"), "source/uncond") | dict.fromkeys(
    ("source/cond", "target/cond"), "source/cond"
)


def row_of(made: list[Tensor], group: str) -> list[Tensor]:
    return [x[GROUPS.index(group)] for x in made]


def test_mutual_attention_looks_at_the_source_of_its_half(tiny: Any) -> None:
    op, made = MutualSelfAttention(Sharing("masactrl", "self")), qkv(4, 16)
    found = outputs(op, made, call_at(site_of(tiny)))
    for group, o in found.items():
        q = row_of(made, group)[0]
        wanted = loop_attention(q, *row_of(made, SOURCES[group])[1:])
        torch.testing.assert_close(o[0], wanted)


def test_an_unguided_source_serves_both_halves(tiny: Any) -> None:
    op, made = MutualSelfAttention(Sharing("masactrl", "self")), qkv(3, 16)
    found = outputs(op, made, call_at(site_of(tiny), groups=UNGUIDED_SOURCE))
    for n, group in enumerate(UNGUIDED_SOURCE):
        wanted = loop_attention(made[0][n], made[1][1], made[2][1])
        torch.testing.assert_close(found[group][0], wanted)


def test_the_union_looks_at_both(tiny: Any) -> None:
    op, made = MutualSelfAttention(Sharing("masactrl", "self", share="union")), qkv(4, 16)
    found = outputs(op, made, call_at(site_of(tiny)))
    for group, o in found.items():
        (q, k, v), (_, k_s, v_s) = row_of(made, group), row_of(made, SOURCES[group])
        if group.startswith("target"):
            k, v = torch.cat([k_s, k], 1), torch.cat([v_s, v], 1)
        torch.testing.assert_close(o[0], loop_attention(q, k, v))


@pytest.mark.parametrize("empty", [False, True])
def test_masks_split_what_is_looked_at(empty: bool, tiny: Any) -> None:
    """Tokens of the object look at the source's object, others outside it; at all, where there is
    none."""
    op, made = MutualSelfAttention(Sharing("masactrl", "self", share="mask")), qkv(4, 16)
    source, target = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    source[..., :4, :2] = 0 if empty else 1
    target[..., 4:, 4:] = 1
    op.given = {"source": source, "target": target}
    found = outputs(op, made, call_at(site_of(tiny)))
    inside = [] if empty else [0, 4]  # of a 4 x 4 grid
    for group in ("target/uncond", "target/cond"):
        q = row_of(made, group)[0]
        k, v = row_of(made, SOURCES[group])[1:]
        outside = [j for j in range(16) if j not in inside]
        fore = loop_attention(q, k, v, inside or range(16))
        back = loop_attention(q, k, v, outside)
        for i in range(16):
            wanted = fore if i in (10, 11, 14, 15) else back
            torch.testing.assert_close(found[group][0][:, i], wanted[:, i])
    plain = loop_attention(*row_of(made, "source/cond"))
    torch.testing.assert_close(found["source/cond"][0], plain)


def test_masks_of_maps_are_cut_at_the_threshold(tiny: Any) -> None:
    op = MutualSelfAttention(Sharing("masactrl", "self", share="mask-auto", threshold=0.5))
    op.reader = WordReader("masactrl", {SOURCE: torch.ones(1, 4), TARGET: torch.ones(1, 4)}, 64)
    maps = {SOURCE: torch.zeros(1, 4, 4), TARGET: torch.zeros(1, 4, 4)}
    maps[SOURCE][0, 0, :2], maps[TARGET][0, 3, 2:] = torch.tensor([1.0, 0.4]), 1.0
    for group, own in maps.items():
        op.reader.maps[group].add("mid", own)
    made = qkv(4, 16)
    found = outputs(op, made, call_at(site_of(tiny)))["target/cond"][0]
    (q, _, _), (_, k, v) = row_of(made, "target/cond"), row_of(made, "source/cond")
    fore, back = loop_attention(q, k, v, [0]), loop_attention(q, k, v, range(1, 16))
    for i in range(16):
        torch.testing.assert_close(found[:, i], (fore if i in (14, 15) else back)[:, i])
    assert op.shown()["source mask"].sum() == 1 and op.shown()["edit mask"].sum() == 2


def test_at_a_joint_site_the_picture_alone_is_shared(tiny: Any) -> None:
    op, made = MutualSelfAttention(Sharing("masactrl", "joint")), qkv(4, 16 + 3)
    found = outputs(op, made, joint_call(site_of(tiny), text=3, image=16))
    (q, k, v), (_, k_s, v_s) = row_of(made, "target/cond"), row_of(made, "source/cond")
    keys, values = torch.cat([k[:, :3], k_s[:, 3:]], 1), torch.cat([v[:, :3], v_s[:, 3:]], 1)
    torch.testing.assert_close(found["target/cond"][0], loop_attention(q, keys, values))


@pytest.mark.parametrize("share", ["mutual", "union"])
def test_outside_its_steps_nothing_is_shared(share: str, tiny: Any) -> None:
    op = MutualSelfAttention(Sharing("masactrl", "self", share=share, steps=(0.5, 1.0)))
    made = qkv(4, 16)
    for step, shared in enumerate([False, False, True, True]):
        own = outputs(op, made, call_at(site_of(tiny), step))["target/cond"][0]
        plain = loop_attention(*row_of(made, "target/cond"))
        assert torch.allclose(own, plain, atol=1e-6) != shared


REFUSED: list[tuple[Mapping[str, Any], str]] = [
    ({"share": "mask"}, r"share=mask needs the mask of the object; give mask=<a picture>"),
    ({"steps": (0.3, 0.45)}, r"steps=\[0\.3,0\.45\] has none of 4 steps"),
    ({"sites": "cross"}, r"edits self and joint attention, and .* is cross; choose other sites"),
    ({"share": "mask-auto", "mask_words": ["cow"]}, r"the word 'cow' is not in the prompt"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(options: Mapping[str, Any], says: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=rf"methods\.masactrl: .*{says}"):
        edited(tiny, {"masactrl": options}, "a cat", source=OWN)
    assert not any(hosted.ops for hosted in tiny.host.processors.values())


def test_a_kernel_of_another_kind_is_refused_by_name(tiny: Any) -> None:
    methods = {"masactrl": {"sites": "self", "share": "union"}, "tiled": {"sites": "self"}}
    with pytest.raises(
        ValueError, match=r"^methods\.masactrl: it computes .*kernel of methods\.tiled"
    ):
        edited(tiny, methods, "a cat", source=OWN)


def test_wrong_options_are_refused_before_loading() -> None:
    with pytest.raises(RecipeError, match=r"methods\.masactrl\.share='mutal': mutual, union, mask"):
        methods_of({"masactrl": {"share": "mutal"}})
