"""Concepts: one or several at once, each with its token, beside class images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.config.schema import RecipeError
from trainer.config.validate import build_section
from trainer.data.plan import StepPlan
from trainer.data.source import Needs
from trainer.data.sources.concept import Concept


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders of photographs, three of a red thing and four of a blue one."""
    made = []
    for name, colour, count in (("red", (200, 0, 0), 3), ("blue", (0, 0, 200), 4)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        made.append(folder)
    return made


def opened(tmp_path: Path, **options: Any) -> Any:
    def paint(prompts: Any, seed: int, guidance: float | None) -> Any:
        return [Image.new("RGB", (32, 32)) for _ in prompts]

    source = Concept(augment=False, **options)
    return source.open(Needs(32, 4, paint, tmp_path / "cache", lambda: "tiny"))


def test_several_concepts_share_half_of_every_batch(folders: list[Path], tmp_path: Path) -> None:
    train, _ = opened(
        tmp_path,
        concept=[str(folder) for folder in folders],
        token=["<v1>", "<v2>"],
        class_word=["mug", "cat"],
        prior_images=6,
    )
    assert [len(group) for group in train.groups] == [3, 4, 6]
    assert list(train.shares) == [0.25, 0.25, 0.5]
    assert list(train.weights) == [0.5, 0.5, 1.0]
    groups = tuple((group.start, group.stop) for group in train.groups)
    plan = StepPlan(groups, tuple(train.shares), tuple(train.weights), 8, 0)
    assert plan.counts() == [2, 2, 4]
    # loss = mean over concepts of their means + the class images' mean
    assert sum(slot.weight for slot in plan.batch(0)) == pytest.approx(8 * 2.0)


def test_class_images_are_of_the_seed_and_guidance_asked_for(
    folders: list[Path], tmp_path: Path
) -> None:
    def keys(**options: Any) -> set[str]:
        opened(tmp_path, concept=str(folders[0]), class_word="mug", prior_images=2, **options)
        return {path.name for path in (tmp_path / "cache" / "prior").iterdir()}

    first = keys()
    assert keys() == first
    other = keys(prior_seed=1)
    assert len(other - first) >= 1
    assert len(keys(prior_guidance=1.5) - other) >= 1


def test_each_concept_is_captioned_with_its_own_token(folders: list[Path], tmp_path: Path) -> None:
    train, _ = opened(
        tmp_path,
        concept=[str(folder) for folder in folders],
        token=["<v1>", "<v2>"],
        class_word=["mug", "cat"],
        prior_images=4,
    )
    rng = np.random.default_rng(0)
    captions = [train.caption(index, rng) for index in range(len(train))]
    assert all("<v1> mug" in caption for caption in captions[:3])
    assert all("<v2> cat" in caption for caption in captions[3:7])
    assert captions[7:] == ["a photo of a mug", "a photo of a cat"] * 2
    red, blue = train.image(0), train.image(3)
    assert red[0].mean() > 0.5 > red[2].mean()
    assert blue[2].mean() > 0.5 > blue[0].mean()


def test_sprites_can_be_several_too(tmp_path: Path) -> None:
    train, held_out = opened(
        tmp_path, concept=["sprite:penguin", "sprite:owl"], token=["<a>", "<b>"], prior_weight=0
    )
    assert [len(group) for group in train.groups] == [5, 5]
    assert held_out is not None
    assert len(held_out) == 32
    rng = np.random.default_rng(0)
    assert "<a>" in train.caption(0, rng)
    assert "<b>" in train.caption(5, rng)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"token": "<v1>"}, "give each a different one", id="one token"),
        pytest.param({"token": ["<v1>", "<v1>"]}, "give each a different one", id="same token"),
        pytest.param({"class_word": ["mug"]}, "give one for each", id="one class word"),
        pytest.param({"concept": []}, "the list is empty", id="no concept"),
        pytest.param({"concept": ["sprite:penguin", "sprite:owll"]}, "did you mean owl", id="typo"),
    ],
)
def test_lists_that_do_not_agree_are_refused(changes: dict[str, Any], message: str) -> None:
    tree = {
        "concept": ["sprite:penguin", "sprite:owl"],
        "token": ["<v1>", "<v2>"],
        "prior_weight": 0,
    }
    with pytest.raises(RecipeError) as error:
        build_section(Concept, tree | changes, "data")
    assert message in str(error.value)


def test_class_images_are_painted_once_for_each_sampler(tmp_path: Path) -> None:
    asked: list[float | None] = []

    def paint(prompts: Any, seed: int, guidance: float | None) -> Any:
        asked.append(guidance)
        return [Image.new("RGB", (32, 32)) for _ in prompts]

    def open_with(painter: str, guidance: float | None) -> None:
        source = Concept(
            concept="sprite:penguin",
            prior_images=1,
            prior_prompts=("a fox",),
            prior_guidance=guidance,
        )
        source.open(Needs(32, 4, paint, tmp_path, lambda: painter))

    for painter, guidance in (("a", None), ("a", None), ("a", 2.0), ("a", 2.0), ("b", None)):
        open_with(painter, guidance)
    assert asked == [None, 2.0, None]


@pytest.mark.parametrize(
    ("count", "asked", "kept"),
    [(4, None, 0), (5, None, 1), (9, None, 1), (6, 0, 0), (6, 2, 2), (3, 1, 1)],
)
def test_photos_are_held_out_for_validation(
    count: int, asked: int | None, kept: int, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(folder / f"{number}.png")
    train, held_out = opened(
        tmp_path, concept=str(folder), class_word="dog", prior_images=2, validation=asked
    )
    names = [f"{number}.png" for number in range(count)]
    assert [pair.key for pair in train.pairs[: train.num_photos]] == names[: count - kept]
    found = [] if held_out is None else [pair.key for pair in held_out.pairs]
    assert found == names[count - kept :]


def test_a_photo_is_left_to_train_on(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation=3 holds out all 3 photos"):
        opened(tmp_path, concept=str(folders[0]), class_word="dog", prior_weight=0, validation=3)
