"""What an evaluation asks for: of a concept its templates, of captioned pictures their captions,
and nothing about a concept that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.common.paths import DATA
from trainer.config.load import load_recipe
from trainer.data.caption_templates import CONCEPT_PROMPTS
from trainer.data.source import Needs
from trainer.evaluation.judge import Judge
from trainer.evaluation.questions import Questions, Subject, ask, rewritten
from trainer.media.images import read_image, to_tensor

Photographs = Callable[..., Path]
CONCEPT = ("recipe=lora", "data.prior_weight=0", "data.augment=false")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(DATA / "tiny" / "clip")


@pytest.fixture
def asked(judge: Judge, tiny_folder: Path, tmp_path: Path) -> Callable[..., Questions]:
    """`asked(*words)`: of a recipe on a backbone without prompts of its own."""

    def no_class_images(*_: Any) -> Any:
        raise AssertionError("no class images are asked for")

    def of(*words: str, count: int = 4) -> Questions:
        recipe = load_recipe([*words, f"backbone={tiny_folder}"])
        needs = Needs(32, 4, no_class_images, tmp_path / "cache", lambda: "tiny")
        train, held_out = recipe.data.open(needs)
        return ask(recipe, [judge], train, held_out=held_out, count=count)

    return of


def captioned(folder: Path, *captions: str) -> str:
    for number, caption in enumerate(captions):
        (folder / f"{number}.txt").write_text(caption)
    return f"data.folder={folder}"


def test_a_concept_is_asked_for_by_templates_on_any_backbone(
    asked: Any, photographs: Photographs
) -> None:
    place = f"data.concept={photographs('car', 3)}"
    found = asked(*CONCEPT, place, "data.class_word=car", count=10)
    (alone,), (plain,) = found.alone, found.plain
    assert alone.prompts[:2] == ["a photo of a <v1> car", "a <v1> car by the sea"]
    assert alone.prompts[8:] == alone.prompts[:2] and len(set(alone.prompts)) == 8
    assert alone.texts[:2] == ["a photo of a car", "a car by the sea"]
    assert plain.prompts[:3] == ["a car", "a photo of a car", "a car"]
    assert found.pictures == 20 and not found.beside and not found.known
    assert alone.subjects[0].photos[0].shape == (3, 128)
    assert any("no concept accuracy" in note for note in found.notes)


def test_without_a_class_word_no_text_is_made_up(asked: Any, photographs: Photographs) -> None:
    found = asked(*CONCEPT, f"data.concept={photographs('car', 3)}", "data.class_word=null")
    assert found.alone[0].prompts[0] == "a photo of a <v1>"
    assert found.alone[0].texts is None and found.plain[0].prompts == []
    assert any("without data.class_word" in note for note in found.notes)


def test_pictures_with_captions_are_asked_for_by_those_held_out(
    asked: Any, photographs: Photographs
) -> None:
    data = captioned(photographs("car", 5), *(f"car number {number}" for number in range(5)))
    words = ("recipe=lora_folder", data, "data.buckets=0")
    found = asked(*words, "data.validation=2")
    assert found.alone[0].prompts == ["car number 3", "car number 4"] * 2
    assert found.alone[0].texts == found.alone[0].prompts
    assert found.alone[0].subjects[0].photos[0].shape == (3, 128)  # those trained on
    assert found.subjects == [] and found.plain == [] and found.notes == ()
    seen = asked(*words, count=3)
    assert seen.alone[0].prompts == ["car number 0", "car number 1", "car number 3"]
    assert any("captions that were trained on" in note for note in seen.notes)


def test_prompts_of_a_recipe_come_before_captions(asked: Any, photographs: Photographs) -> None:
    data = captioned(photographs("car", 2), "a car", "a bus")
    words = ("recipe=lora_folder", data, "data.buckets=0")
    assert asked(*words, "evaluate.alone=[a red car]").alone[0].prompts == ["a red car"] * 4
    assert asked(*words).alone[0].prompts == ["a car", "a bus"] * 2
    nothing = asked(*words, "evaluate.alone=[]")
    assert nothing.alone == [] and any("nothing is asked for" in note for note in nothing.notes)


def test_a_word_that_no_judge_knows_is_no_text(asked: Any, photographs: Photographs) -> None:
    data = captioned(photographs("car", 2), "a <v1> car", "a <v1> car")
    words = ("methods.new_token={tokens: [<v1>]}", "data.buckets=0")
    found = asked("recipe=lora_folder", data, *words)
    assert found.alone[0].prompts[0] == "a <v1> car" and found.alone[0].texts is None
    assert any("no CLIP-T: the prompts hold <v1>" in note for note in found.notes)


def subject(token: str, kind: str | None, word: str | None) -> Subject:
    return Subject(photos=(), token=token, kind=kind, word=word)


def test_prompts_of_the_first_concept_are_put_for_the_others() -> None:
    fox = subject("<v1>", "animal", "fox")
    prompts = ["a photo of a <v1> animal", "An <v1> by the sea", "a <v1> fox and a <v11>"]
    apple = subject("<apple>", "fruit", "apple")
    assert rewritten(prompts[:2], [fox, apple], apple) == [
        "a photo of an <apple> fruit",
        "An <apple> by the sea",
    ]
    bare = subject("<v2>", None, None)
    assert rewritten(prompts[:2], [fox, bare], bare) == ["a photo of a <v2>", "A <v2> by the sea"]
    assert rewritten(prompts, [fox, apple], fox) == prompts


def test_the_text_that_a_judge_reads_has_the_plain_word_and_its_article(asked: Any) -> None:
    found = asked("recipe=lora", "data.concept=sprite:apple", "data.class_word=fruit",
                  "data.prior_weight=0", "evaluate.beside=[]", "evaluate.known=[]",
                  "evaluate.alone=[a <v1> fruit by the sea,a red <v1>,the <v1> fruit]")  # fmt: skip
    assert found.alone[0].texts[:3] == ["an apple by the sea", "a red apple", "the apple"]


def test_class_images_are_those_of_the_concepts_own_kind(
    asked: Any, judge: Judge, photographs: Photographs
) -> None:
    car, bus = photographs("car", 3), photographs("bus", 3)
    cars, buses = photographs("car", 5, seed=4), photographs("bus", 5, seed=4)
    found = asked(
        "recipe=lora", f"data.concept=[{car},{bus}]", "data.token=[<v1>,<v2>]",
        "data.class_word=[car,bus]", f"data.prior_folder=[{cars},{buses}]",
        "methods.new_token.tokens=[<v1>,<v2>]", "methods.new_token.init=[car,bus]",
        "data.augment=false",
    )  # fmt: skip
    own = [each.others[0] for each in found.subjects]
    assert [len(each) for each in own] == [5, 5]
    for photos, folder in zip(own, (cars, buses), strict=True):
        shown = [to_tensor(read_image(folder / f"{number}.png")) for number in range(5)]
        mean = torch.stack([judge.features([each])[0] for each in shown]).mean(0)
        assert torch.nn.functional.cosine_similarity(photos.mean(0), mean, dim=0) > 0.95
    assert torch.nn.functional.cosine_similarity(own[0].mean(0), own[1].mean(0), dim=0) < 0.9


def test_the_templates_name_the_concept_once_each() -> None:
    assert len(set(CONCEPT_PROMPTS)) == len(CONCEPT_PROMPTS) >= 8
    assert all(text.count("{token} {class}") == 1 for text in CONCEPT_PROMPTS)
