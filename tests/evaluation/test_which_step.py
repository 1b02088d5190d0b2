"""Which step to keep: the points of the rule by hand, and what decides without them."""

from __future__ import annotations

import pytest

from trainer.evaluation.examiner import Scores
from trainer.evaluation.which_step import step_to_keep

BASE: Scores = {"CLIP-I": 0.5, "CLIP-T": 0.30, "PRES (CLIP)": 0.4, "prior drift (CLIP)": 0.0}


def scores(alike: float, aligned: float, pres: float, **more: float | None) -> Scores:
    return {"CLIP-I": alike, "CLIP-T": aligned, "PRES (CLIP)": pres, **more}


def test_likeness_against_alignment_and_drift() -> None:
    """Later the likeness still grows, and costs more than it brings."""
    steps = {
        100: scores(0.60, 0.31, 0.40),  # 1.0 + 0.2 - 0.0
        200: scores(0.75, 0.29, 0.45),  # 2.5 - 0.2 - 0.5
        300: scores(0.80, 0.25, 0.60),  # 3.0 - 1.0 - 2.0
    }
    choice = step_to_keep(BASE, steps)
    assert choice.points == pytest.approx({100: 1.2, 200: 1.8, 300: 0.0})
    assert choice.step == 200
    assert choice.why.startswith("keep step 200: 1.80 points, the most of 3 steps, for likeness")
    assert "CLIP-I 0.500 -> 0.750, CLIP-T 0.300 -> 0.290, PRES (CLIP) 0.400 -> 0.450" in choice.why


def test_dino_is_the_likeness_where_there_is_one() -> None:
    base = {**BASE, "DINO": 0.2, "PRES (DINO)": 0.1}
    steps = {
        100: {**scores(0.9, 0.30, 0.4), "DINO": 0.3, "PRES (DINO)": 0.1},  # 1.0
        200: {**scores(0.5, 0.30, 0.9), "DINO": 0.5, "PRES (DINO)": 0.15},  # 3.0 - 0.5
    }
    choice = step_to_keep(base, steps)
    assert choice.points == pytest.approx({100: 1.0, 200: 2.5}) and choice.step == 200


def test_what_is_not_known_of_every_step_is_left_out() -> None:
    steps = {100: {**scores(0.6, 0.3, 0.9), "PRES (CLIP)": None}, 200: scores(0.7, 0.29, 0.9)}
    choice = step_to_keep(BASE, steps)
    assert choice.points == pytest.approx({100: 1.0, 200: 1.8})
    assert "prior drift" not in choice.why and "PRES" not in choice.why


def test_where_all_is_lost_it_says_so() -> None:
    choice = step_to_keep(BASE, {100: scores(0.5, 0.2, 0.4), 200: scores(0.4, 0.1, 0.4)})
    assert choice.step == 100 and choice.points[100] == pytest.approx(-2.0)
    assert "no step gains more than it loses against the base" in choice.why
    assert "no step gains" not in step_to_keep(BASE, {100: scores(0.6, 0.3, 0.4)}).why


def test_known_sprites_stand_in_for_drift() -> None:
    base: Scores = {"CLIP-I": 0.5, "CLIP-T": 0.3, "known sprites": 0.9}
    steps: dict[int, Scores] = {
        100: {"CLIP-I": 0.7, "CLIP-T": 0.3, "known sprites": 0.8},  # 2.0 - 1.0
        200: {"CLIP-I": 0.8, "CLIP-T": 0.3, "known sprites": 0.6},  # 3.0 - 3.0
    }
    choice = step_to_keep(base, steps)
    assert choice.points == pytest.approx({100: 1.0, 200: 0.0}) and choice.step == 100
    with_kind = {step: {**own, "PRES (CLIP)": 0.4} for step, own in steps.items()}
    assert step_to_keep({**base, "PRES (CLIP)": 0.4}, with_kind).points == choice.points


def test_of_equals_the_earlier() -> None:
    steps = {200: scores(0.7, 0.3, 0.4), 100: scores(0.7, 0.3, 0.4)}
    assert step_to_keep(BASE, steps).step == 100


def test_without_a_likeness_the_validation_loss_or_nothing() -> None:
    steps: dict[int, Scores] = {1: {"validation loss": 0.2}, 2: {"validation loss": 0.1}}
    choice = step_to_keep({}, steps)
    assert choice.step == 2 and "validation loss is the least, 0.1" in choice.why
    assert not choice.points
    nothing = step_to_keep({}, {1: {"validation loss": None}})
    assert nothing.step is None and "look at the pictures" in nothing.why
