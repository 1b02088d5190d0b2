"""Prompts follow the concept's word and kind, whatever they are called; a word that the model does
not have is refused wherever a prompt may hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from trainer.config.load import load_recipe, resolve_recipe, task_recipe
from trainer.config.prompts import words_in
from trainer.config.schema import RecipeError
from trainer.data.caption_templates import fill
from trainer.runs.run_folder import recipe_header

CUSTOM = "recipe=custom_diffusion"


@pytest.fixture
def dogs(tmp_path: Path) -> str:
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    return f"data.concept={tmp_path}"


def refusal(*words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(words)
    return str(caught.value)


@pytest.mark.parametrize("many", [True, False])
def test_the_words_of_an_adapter_are_those_of_its_first_concept(many: bool) -> None:
    data = {"token": ["<a>", "<b>"], "class_word": ["cup", "dog"]}
    if not many:
        data = {"token": "<a>", "class_word": "cup"}  # type: ignore[dict-item]
    words = words_in({"data": data, "methods": {}}, ["<a>", "fox"])
    assert words.prompt("my {token} {class}", "prompt") == "my <a> cup"


def test_one_key_names_the_word_everywhere() -> None:
    """Previews, maps, evaluation and the new word went on about <v1>."""
    made = load_recipe([CUSTOM, "data.token=<dog>"])
    assert made.methods["new_token"].words == ("<dog>",)
    assert made.preview.maps == "<dog>"
    asked = made.evaluate
    for prompts in (made.preview.prompts, asked.alone, asked.beside):
        assert prompts and all("<dog>" in prompt and "<v1>" not in prompt for prompt in prompts)
    header = recipe_header(made)
    assert header["methods"]["new_token"]["tokens"] == ["<dog>"]
    name = header.pop("recipe")
    assert resolve_recipe(name, header, {}).evaluate == asked  # as `evaluate` reads an adapter


def test_prompts_name_the_kind_with_its_article(dogs: str) -> None:
    prompts = "preview.prompts=[a {class}, A {token} {class}, the {class}s, 'a {token}']"
    made = load_recipe(
        [CUSTOM, "backbone=sd15", dogs, "data.class_word=owl", "data.token=sks", prompts]
    )
    assert made.preview.prompts == ("an owl", "A sks owl", "the owls", "a sks")
    alone = load_recipe([CUSTOM, "backbone=sd15", dogs, "data.class_word=null",
                         "data.prior_weight=0"])  # fmt: skip
    assert alone.preview.prompts[0] == "a photo of a <v1>"
    assert alone.preview.prompts[3] == "a <v1> next to a red ball"


def test_several_words_are_added_as_the_data_has_them(dogs: str) -> None:
    made = load_recipe(
        [CUSTOM, "data.concept=[sprite:penguin, sprite:owl]", "data.token=[<a>, <b>]"]
    )
    assert made.methods["new_token"].words == ("<a>", "<b>")
    assert made.preview.prompts[0] == "an <a> on a blue background"
    Path(dogs.partition("=")[2], "0.txt").write_text("a <v1> in <style>")
    own = load_recipe([CUSTOM, dogs, "data.class_word=dog", "data.prior_weight=0",
                       "methods.new_token.tokens=[<v1>, <style>]",
                       "preview.prompts=['a <v1> in <style>']"])  # fmt: skip
    assert own.methods["new_token"].words == ("<v1>", "<style>")


def test_tasks_name_their_own_word_and_kind(tmp_path: Path) -> None:
    tree = {
        "base": "sequential_lora",
        "continual": {"concepts": ["sprite:penguin", "sprite:owl"], "tokens": ["<a>", "<b>"],
                      "class_words": ["bird", "owl"]},
        "backbones": {"tiny": {"preview": {"every": 5}}},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    whole = load_recipe([f"recipe={tmp_path / 'mine.yaml'}", "preview.maps={token}",
                         "preview.prompts=[a {token} {class}, a {class}]"])  # fmt: skip
    second = task_recipe(whole, 1)
    assert second.preview.prompts == ("a <b> owl", "an owl")
    assert second.preview.maps == "<b>"
    assert all("<b>" in prompt for prompt in (*second.evaluate.alone, *second.evaluate.beside))


@pytest.mark.parametrize("key", [
    "preview.prompts", "preview.negative", "preview.maps", "evaluate.alone", "evaluate.beside",
    "evaluate.together", "evaluate.known", "evaluate.negative",
])  # fmt: skip
def test_words_that_no_model_has_are_refused(key: str) -> None:
    text = "a <v11> left of a {} by a {}" if key == "evaluate.together" else "a <v11>"
    value = text if key.endswith(("negative", "maps")) else f"['{text}']"
    said = refusal(CUSTOM, f"{key}={value}")
    assert said.startswith(f"{key}: ")
    assert "<v11> is no word of this model; did you mean <v1>?; {token} stands for" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.token=<dog>", "preview.prompts=['a <v1>']"], "<v1> is no word of this model"),
        (["preview.prompts=['a {tokn}']"], "{tokn} stands for nothing; did you mean token?"),
        (["preview.prompts=['a {class}']"], "{class} stands for data.class_word, and this recipe"),
        (["data.prior_prompts=['a <v1>']"], "prior_prompts: 'a <v1>': <v1> is no word of this"),
        (["data.prior_prompts=['a {token}']"], "{token} stands for a new word, and this recipe"),
    ],
)  # fmt: skip
def test_places_that_stand_for_nothing_are_refused(words: list[str], says: str) -> None:
    assert says in refusal(CUSTOM, *words)


def test_a_word_that_no_method_adds_is_said() -> None:
    said = load_recipe([CUSTOM, "methods.new_token=null", "data.token=<v1>"]).said
    assert any(line.startswith("data.token=<v1>: no method adds it, so") for line in said)
    assert not any("no method" in line for line in load_recipe([CUSTOM]).said)


def test_other_brackets_are_plain_text() -> None:
    prompts = ["a {red|blue} dog", "i <3 dogs", "<|startoftext|>", "a < b > c", "{}"]
    tree: dict[str, Any] = {"data": {"source": "world"}, "methods": {"full": {}},
                            "preview": {"prompts": prompts}}  # fmt: skip
    assert resolve_recipe("mine", tree, {}).preview.prompts == tuple(prompts)
    assert fill("no place", None, None) == "no place"


def test_words_of_the_run_below_are_known(tmp_path: Path) -> None:
    """A run over a finished one may name the word that it learned, and no other."""
    from trainer.common.paths import DATA

    tree = {"data": {"source": "world"}, "methods": {"full": {}}, "preview": {"prompts": ["<v1>"]}}
    with pytest.raises(RecipeError, match=r"<v1> is no word of this model; it has none"):
        resolve_recipe("mine", tree, {"backbone": str(DATA / "tiny_words")})
