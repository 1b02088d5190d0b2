"""Every caption is counted before anything trains: is the new word in it read?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError

CUSTOM = ["recipe=lora", "data.class_word=null", "data.prior_weight=0"]
MANY = "a fox on a blue background " * 5


@pytest.fixture
def photos(tmp_path: Path) -> Any:
    """`photos("a", "b")`: the word that names a folder of photos with these captions."""

    def make(*captions: str | None) -> str:
        folder = tmp_path / "photos"
        folder.mkdir()
        for number, caption in enumerate(captions):
            Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
            if caption is not None:
                (folder / f"{number}.txt").write_text(caption)
        return f"data.concept={folder}"

    return make


def refusal(*words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("token", "caption", "says"),
    [
        ("<v1>", f"{MANY} and <v1>", "1.txt: the caption is "),
        ("<v1>", "a fox", "1.txt: the caption must contain the token <v1>"),
        ("zwx", "a zwxcat", "1.txt: the caption has zwx only inside another word"),
        ("zwx", "a catzwx and zwx_y", "1.txt: the caption has zwx only inside another word"),
        ("zwx", "Zwxcat", "1.txt: the caption has zwx only inside another word"),
    ],
)
def test_a_caption_whose_word_is_not_read_is_named(
    token: str, caption: str, says: str, photos: Any
) -> None:
    if caption.startswith(MANY):
        caption = f"{MANY}{MANY}{caption}"
    folder = photos(f"a {token} here", caption, f"the {token}")
    for more in ([], ["methods.new_token=null"]):  # a word of the vocabulary is read in pieces
        if token.startswith("<") and more:
            continue
        said = refusal(*CUSTOM, folder, f"data.token={token}", "data.augment=false", *more)
        assert says in said, said
        assert "0.txt" not in said and "2.txt" not in said


def test_all_are_counted(photos: Any) -> None:
    folder = photos("a zwx here", "the Zwx, big", None)
    found, *said = load_recipe([*CUSTOM, folder, "data.token=zwx", "data.augment=false"]).said
    assert found.endswith("3 photos; captions: 2 from .txt, 1 from a template; masks: none")
    assert said[0].startswith("captions: 23, 23 with zwx; the longest has ")
    assert "tokens of 30 that are read" in said[0]


def test_words_put_before_a_caption_may_push_its_word_out(photos: Any) -> None:
    """28 tokens, then `zoomed in` by data.augment, then the word."""
    text = "fox " * 29 + "<v1>"
    folder = photos(text)
    assert load_recipe([*CUSTOM, folder, "data.augment=false"])
    said = refusal(*CUSTOM, folder, "data.augment=true")
    assert "with 'a far away' of data.augment before it: the caption is 33 tokens long" in said
    assert "and 1 more captions" in said


def test_long_captions_are_said(photos: Any) -> None:
    folder = photos(f"a <v1> {MANY}{MANY}", "a <v1>")
    said = load_recipe([*CUSTOM, folder, "data.augment=false"]).said[1:]
    assert "longer than the 30 tokens that are read: " in said[1] and "0.txt (62 tokens)" in said[1]
    assert "text.max_tokens=90 reads all" in said[1]
    more = load_recipe([*CUSTOM, folder, "data.augment=false", "text.max_tokens=90"]).said[1:]
    assert len(more) == 1 and "of 90 that are read" in more[0]


def test_a_prompt_whose_word_is_not_read_is_refused() -> None:
    said = refusal("recipe=lora", f"preview.prompts=['{MANY}{MANY}<v1>']")
    assert said.startswith("preview.prompts: ") and "<v1> is beyond" in said
    long = load_recipe(["recipe=lora", f"evaluate.alone=['a <v1> {MANY}{MANY}']"]).said
    assert any("longer than the 30 tokens" in line and "evaluate.alone" in line for line in long)


def test_captions_of_a_folder_may_lack_a_word_but_not_lose_it(photos: Any, tmp_path: Path) -> None:
    photos("a fox", "a zwx", "a dog")
    words = ["recipe=lora", "data.source=folder", f"data.folder={tmp_path / 'photos'}",
             "methods.new_token.tokens=[zwx]", "preview.every=0",
             *(f"data.{key}=null" for key in ("concept", "prior_images", "prior_steps", "augment",
               "class_word", "prior_prompts", "prior_guidance"))]  # fmt: skip
    assert "captions: 3, 1 with zwx" in load_recipe(words).said[1]
    (tmp_path / "photos" / "2.txt").write_text("a zwxdog")
    assert "2.txt: the caption has zwx only inside another word" in refusal(*words)
    for number in (1, 2):
        (tmp_path / "photos" / f"{number}.txt").write_text("a dog")
    assert "zwx is in none of 3 captions, so nothing would train it" in refusal(*words)


def test_tags_that_may_push_a_word_out(photos: Any, tmp_path: Path) -> None:
    """The caption as it stands begins with the word; shuffled, it may end with it."""
    photos("<v1>, " + ", ".join(["a fox by a clock"] * 8), "a dog, <v1>")
    words = ["recipe=lora_folder", f"data.folder={tmp_path / 'photos'}", "methods.new_token={}"]
    assert load_recipe(words)
    said = refusal(*words, "data.shuffle_tags=true")
    assert "0.txt: the caption is " in said and "where data.shuffle_tags puts it last" in said
    assert "1.txt" not in said
    assert load_recipe([*words, "data.shuffle_tags=true", "data.keep_tags=1"])
    assert load_recipe([*words, "data.shuffle_tags=true", "text.max_tokens=60"])


def test_a_word_that_no_caption_holds(photos: Any, tmp_path: Path) -> None:
    photos("a clock left of a fox", "a cleft rock", "a zwx")
    folder = f"data.folder={tmp_path / 'photos'}"
    words = ["recipe=lora_folder", folder, "methods.word_embedding.tokens=[left,rock]"]
    assert "captions: 3, 1 with left, 1 with rock" in load_recipe(words).said[1]
    said = refusal("recipe=lora_folder", folder, "methods.word_embedding.tokens=[left,dog]")
    assert said.startswith("dog is in none of 3 captions, so nothing would train it")
    concept = ["recipe=lora", f"data.concept={tmp_path / 'photos'}", "data.token=zwx"]
    concept += ["data.class_word=null", "data.prior_weight=0", "data.augment=false"]
    for number in range(3):
        (tmp_path / "photos" / f"{number}.txt").write_text("a zwx")
    assert load_recipe(concept)
    said = refusal(*concept, "methods.new_token.tokens=[zwx,<v2>]")
    assert said.startswith("<v2> is in none of 3 captions")
    (tmp_path / "photos" / "0.txt").write_text("a zwx beside <v2>")
    assert load_recipe([*concept, "methods.new_token.tokens=[zwx,<v2>]"])


def test_a_word_needs_captions(photos: Any, tmp_path: Path) -> None:
    photos("a <v1>")
    words = ["recipe=lora_folder", f"data.folder={tmp_path / 'photos'}"]
    never = "objective.caption_dropout=1"
    assert load_recipe([*words, never])
    for more in ("methods.new_token={}", "methods.word_embedding.tokens=[fox]"):
        assert "caption_dropout=1 leaves no caption, so " in refusal(*words, never, more)
