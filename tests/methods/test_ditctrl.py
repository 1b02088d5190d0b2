"""DiTCtrl's sharing, masks and weights against loops, on a small model of joint attention, and its
refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_checks import (
    GROUPS,
    apart,
    edited,
    joint_call,
    latents,
    loop_attention,
    outputs,
    qkv,
    site_of,
)
from flow_folders import make_flow_folder, sd3_pipeline

from trainer.ops.ditctrl import JointControl, JointSharing, of_text
from trainer.ops.editing.word_maps import WordMaps
from trainer.ops.editing.word_reader import SOURCE, TARGET

OWN, PROMPT = "a fox on a red background", "a cat on a red background"
TEXT, IMAGE = 3, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flow_folder(tmp_path_factory.mktemp("sd3") / "tiny", sd3_pipeline, t5=False)


def control(**options: Any) -> JointControl:
    return JointControl(JointSharing("ditctrl", "joint", steps=(0.0, 1.0), **options))


def test_keys_and_values_of_text_and_image_are_the_sources(tiny: Any) -> None:
    op, made = control(), qkv(4, TEXT + IMAGE)
    found = outputs(op, made, joint_call(site_of(tiny), text=TEXT, image=IMAGE))
    for n, group in enumerate(GROUPS):
        source = n - 1 if group.startswith("target") else n
        wanted = loop_attention(made[0][n], made[1][source], made[2][source])
        torch.testing.assert_close(found[group][0], wanted)


def test_weights_are_on_both_blocks_between_text_and_image(tiny: Any) -> None:
    op, made = control(weights={"red": 2.0}), qkv(4, TEXT + IMAGE)
    op.weight = torch.tensor([[1.0, 3.0, -2.0]])
    found = outputs(op, made, joint_call(site_of(tiny), text=TEXT, image=IMAGE))
    q, k, v = made[0][3], made[1][2], made[2][2]
    probs = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    for i in range(TEXT + IMAGE):
        for j in range(TEXT + IMAGE):
            if (i < TEXT) != (j < TEXT):
                probs[:, i, j] *= op.weight[0, min(i, j)]
    torch.testing.assert_close(found["target/cond"][0], probs @ v)
    plain = loop_attention(made[0][1], made[1][0], made[2][0])
    torch.testing.assert_close(found["target/uncond"][0], plain)


def test_masks_part_the_picture_and_leave_the_text(tiny: Any) -> None:
    op, made = control(words=["fox"], threshold=0.5), qkv(4, TEXT + IMAGE)
    op.columns = {group: torch.zeros(1, TEXT) for group in (SOURCE, TARGET)}
    op.maps = {group: WordMaps(64) for group in (SOURCE, TARGET)}
    fox, cat = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    fox[0, 0, :2], cat[0, 3] = 1.0, 1.0
    op.maps[SOURCE].add("other", fox)
    op.maps[TARGET].add("other", cat)
    found = outputs(op, made, joint_call(site_of(tiny), text=TEXT, image=IMAGE))
    inside = [TEXT, TEXT + 1]
    words = list(range(TEXT))
    outside = [j for j in range(TEXT, TEXT + IMAGE) if j not in inside]
    for n in (1, 3):
        q, k, v = made[0][n], made[1][n - 1], made[2][n - 1]
        fore, back = (loop_attention(q, k, v, words + keys) for keys in (inside, outside))
        whole = loop_attention(q, k, v)
        for i in range(TEXT + IMAGE):
            wanted = whole if i < TEXT else fore if i >= TEXT + 12 else back
            torch.testing.assert_close(found[GROUPS[n]][0][:, i], wanted[:, i])


def test_maps_of_words_are_those_of_image_queries(tiny: Any) -> None:
    op = control(words=["fox"])
    op.columns = {group: torch.tensor([[0.0, 1.0, 0.0]]) for group in (SOURCE, TARGET)}
    op.maps = {group: WordMaps(64) for group in (SOURCE, TARGET)}
    made, call = qkv(4, TEXT + IMAGE), joint_call(site_of(tiny), text=TEXT, image=IMAGE)
    outputs(op, made, call)
    for n, group in ((2, SOURCE), (3, TARGET)):
        probs = (made[0][n] @ made[1][n].transpose(-2, -1) / 2).softmax(-1)
        wanted = probs[:, TEXT:, 1].mean(0).view(1, 4, 4)
        torch.testing.assert_close(op.maps[group].average(), wanted)
    small = control(words=["fox"], tokens=IMAGE - 1)
    small.columns = op.columns
    small.maps = {group: WordMaps(IMAGE - 1, "mask_tokens") for group in (SOURCE, TARGET)}
    with pytest.raises(ValueError, match=r"has at most 15 tokens, of whose .* give more mask_tok"):
        outputs(small, made, call)


def test_on_a_model_of_joint_attention(folder: Path, open_folder: Callable[[Path], Any]) -> None:
    """The source's prompt gives the source, weights and masks change an edit, the source stays."""
    model = open_folder(folder)
    plain = latents(model, [OWN])
    every = {"sites": "joint", "steps": (0.0, 1.0)}
    found = []
    for options in ({}, {"mask_words": ["fox", "cat"]}, {"word_weights": {"red": -3.0}}):
        prompts = [PROMPT] if "mask_words" in options else [OWN, PROMPT]
        made, source = edited(model, {"ditctrl": every | options}, *prompts, source=OWN)
        torch.testing.assert_close(source[:1], plain, rtol=0, atol=1e-3)
        if not options:
            torch.testing.assert_close(made[:1], plain, rtol=0, atol=1e-3)
        assert apart(made[-1:], plain) > 1e-5
        found.append(made[-1:])
    assert apart(found[0], found[1]) > 1e-6 and apart(found[0], found[2]) > 1e-6
    with pytest.raises(ValueError, match=r"methods\.ditctrl: the word 'cow' is not in the prompt"):
        edited(model, {"ditctrl": every | {"mask_words": ["cow"]}}, PROMPT, source=OWN)


def test_words_need_text_in_the_sequence(dit: Any) -> None:
    for options in ({"mask_words": ["fox"]}, {"word_weights": {"red": 2.0}}):
        says = r"^methods\.ditctrl: mask_words and word_weights are for layers whose text"
        with pytest.raises(ValueError, match=says):
            edited(dit, {"ditctrl": options | {"sites": "self"}}, PROMPT, source=OWN)


def test_tokens_of_further_encoders_are_of_no_word() -> None:
    known = torch.tensor([[1.0, 0.0, 2.0]])
    assert of_text(known, 5, filled=1.0).tolist() == [[1, 0, 2, 1, 1]]
    with pytest.raises(ValueError, match="a prompt has 3 tokens, and the sequence 2 of text"):
        of_text(known, 2, filled=0.0)
