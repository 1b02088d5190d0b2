"""Which tokens of a prompt its words are, by the tokenizer of every family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from family_folders import MAKERS

from trainer.attention.read_prompt import ReadPrompt
from trainer.backbones import load_backbone
from trainer.config.lineage import backbone_spec
from trainer.methods.weight.new_token import NewToken

PROMPT = "a red fox, left of an apple tree"
WORDS = ("a", "red", "fox", ",", "left", "of", "an", "apple", "tree")


def opened(folder: Path, most: int | None = None) -> Any:
    spec = backbone_spec(str(folder)).model_copy(update={"max_tokens": most})
    return load_backbone(spec, str(folder)).eval()


def letters(text: str) -> str:
    return re.sub(r"\s", "", text).lower()


@pytest.mark.parametrize("family", ["tiny", *MAKERS])
def test_the_tokens_of_every_word_spell_it(family: str, tmp_path: Path, tiny_folder: Path) -> None:
    """As the tokenizer decodes them; those that stand before and after all belong to no word."""
    model = opened(tiny_folder if family == "tiny" else MAKERS[family](tmp_path / family))
    found = model.prompts.read(PROMPT)
    if family == "dit":  # told a class
        assert found == ReadPrompt(PROMPT, words=(), tokens=(), length=0)
        return
    # SD3's denoiser gets the tokens of T5 after those of CLIP, which are read here
    assert found.words == WORDS and found.length == (32 if family == "sd3" else model.text_length)
    prompts = model.prompts
    template = model.declared.template
    dropped = 0 if template is None else template.dropped  # of what stands before every prompt
    row = prompts.tokens([PROMPT]).input_ids[0].tolist()[dropped:]
    for word, places in zip(found.words, found.tokens, strict=True):
        spelled = prompts.tokenizer.decode([row[place] for place in places])
        assert letters(spelled) in (word, "<unk>")  # some tiny vocabularies have no comma
    every = [place for places in found.tokens for place in places]
    assert every == list(range(every[0], every[0] + len(every)))
    assert sorted([*every, *found.others]) == list(range(found.length))


def test_a_new_word_of_several_vectors_is_one_word(tiny: Any) -> None:
    NewToken(tokens=("<v1>", "<v1>_1", "<v1>_2"), init="fox").apply(tiny)
    found = tiny.prompts.read("a <v1> on a tree")
    assert found.words == ("a", "<v1>", "on", "a", "tree")
    assert found.tokens == ((1,), (2, 3, 4), (5,), (6,), (7,))


def test_parts_of_a_long_prompt_have_a_begin_and_an_end_each(tiny_folder: Path) -> None:
    model = opened(tiny_folder, 60)
    text = " ".join(["fox"] * 29 + ["tree", "apple"] + ["fox"] * 40)
    found = model.prompts.read(text)
    assert found.length == 64
    assert found.tokens[28:31] == ((29,), (30,), (33,))  # 31 and 32 are an end and a begin
    ids = model.prompts.tokens([text]).input_ids.flatten().tolist()
    own = model.tokenizer("apple", add_special_tokens=False).input_ids
    assert [ids[33]] == own
    assert found.tokens[59:61] == ((62,), ())  # 60 tokens are read


def test_a_word_beyond_what_is_read_is_refused(tiny: Any) -> None:
    found = tiny.prompts.read(" ".join(["fox"] * 30 + ["tree"]))
    assert found.find("tree") == [30]
    with pytest.raises(ValueError, match=r"the word 'tree' of the prompt .* is beyond the tokens"):
        found.places([30])


def test_words_are_found_wherever_they_are() -> None:
    words = ("a", "red", "Fox", "and", "a", "red", "fox", "red")
    found = ReadPrompt("", words, tuple((n,) for n in range(1, 9)), length=12)
    assert found.find("fox") == [2, 6]
    assert found.find("red  fox") == [1, 2, 5, 6]
    assert found.find("Fox red") == [6, 7]
    assert found.find("") == found.find("cat") == []
    assert found.places([2, 6]) == [3, 7]
    assert found.others == [0, 9, 10, 11]
