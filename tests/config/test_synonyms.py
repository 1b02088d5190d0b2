"""Words of other trainers lead to keys that exist, and never hide one."""

from __future__ import annotations

import pytest

from trainer.__main__ import main
from trainer.cli.help_pages import command_records
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.section import keys_of
from trainer.config.load import load_recipe
from trainer.config.schema import KEYS, SECTIONS, RecipeError
from trainer.config.synonyms import SYNONYMS, meant_keys
from trainer.data.source import Source
from trainer.methods.apply import find_method, method_names

# every place where keys stand, by what precedes them in a recipe
PLACES: dict[str, list[set[str]]] = {
    **{name: [set(section.model_fields)] for name, section in SECTIONS.items()},
    **{f"methods.{name}": [set(find_method(name).model_fields)] for name in method_names()},
    "data": [set(Source.find(name).model_fields) for name in Source.names()],
    "": [set(KEYS), *(set(keys_of(record)) for record in command_records().values())],
}
PAIRS = [(word, target) for word, targets in SYNONYMS.items() for target in targets]
Printed = pytest.CaptureFixture[str]


@pytest.mark.parametrize(("word", "target"), PAIRS)
def test_every_target_exists_and_the_word_is_free_there(word: str, target: str) -> None:
    home, _, name = target.rpartition(".")
    having = [keys for keys in PLACES[home] if name in keys]
    assert having, f"{target} does not exist"
    if word == name:  # as rank, of methods alone: it is hinted at the top of a recipe
        assert home
    else:
        assert any(word not in keys for keys in having), f"{word} is a key beside {target}"
    assert word not in KEYS


@pytest.mark.parametrize("word", SYNONYMS)
def test_words_are_looked_up_as_they_are_written(word: str) -> None:
    assert word == word.lower()
    assert "-" not in word and "." not in word


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("learning_rate=1e-4", "optim.lr"),
        ("learning-rate=1e-4", "optim.lr"),
        ("LEARNING_RATE=1e-4", "optim.lr"),
        ("size=512", "run.resolution"),
        ("image_size=512", "run.resolution"),
        ("scale=2", "methods.lora.alpha"),
        ("max_train_steps=9", "run.steps"),
        ("num_steps=9", "run.steps"),
        ("rank=8", "methods.lora.rank"),
        ("train_batch_size=2", "run.batch_size"),
        ("batch=2", "run.batch_size"),
        ("output_dir=x", "run.out"),
        ("gradient_accumulation_steps=2", "run.accumulate"),
        ("mixed_precision=fp16", "run.precision"),
        ("seed=1", "run.seed or preview.seed"),
        ("num_workers=2", "run.workers"),
        ("lr_scheduler=cosine", "optim.schedule"),
        ("lr_warmup_steps=9", "optim.warmup"),
        ("instance_data_dir=x", "data.concept"),
        ("instance_prompt=x", "data.token or data.class_word"),
        ("class_prompt=x", "data.class_word"),
        ("pretrained_model_name_or_path=x", "backbone"),
        ("model=x", "backbone"),
        ("report_to=wandb", "tracker"),
        ("snr_gamma=5", "objective.min_snr_gamma"),
        ("noise_offset=0.1", "objective.offset_noise"),
        ("network_dim=8", "methods.lora.rank"),
        ("network_alpha=8", "methods.lora.alpha"),
        ("optim.learning_rate=1", "optim.lr"),
        ("optim.max_train_steps=9", "run.steps"),
        ("run.image_size=64", "run.resolution"),
        ("run.learning_rate=1", "optim.lr"),
        ("data.instance_data_dir=x", "data.concept"),
        ("methods.lora.network_dim=8", "methods.lora.rank"),
        ("methods.dora.network_dim=8", "methods.dora.rank"),
        ("preview.guidance_scale=3", "preview.guidance"),
        ("preview.random_seed=3", "preview.seed"),
        ("evaluate.num_inference_steps=3", "evaluate.steps"),
    ],
)
def test_a_recipe_names_the_key_that_was_meant(word: str, key: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(["recipe=lora", word])
    name = word.partition("=")[0]
    assert str(refused.value) == f"{name}: no such key; did you mean {key}?"


def test_the_recipe_decides_whose_rank_it_is() -> None:
    with pytest.raises(RecipeError, match=r"rank: no such key; did you mean methods.dora.rank\?"):
        load_recipe(["recipe=dora", "rank=8"])
    both = {"methods": {"dora": {}, "c_lora": {}, "selective": {}, "lora": None}}
    meant = meant_keys("rank", KEYS, "", values=both)
    assert meant == ["methods.dora.rank", "methods.c_lora.rank"]
    assert meant_keys("rank", KEYS[2:], "backbones.tiny", values=both)[0].startswith("backbones.")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("sample", "guidance_scale=3"), "guidance"),
        (("sample", "num_inference_steps=3"), "steps"),
        (("sample", "negative_prompt=x"), "negative"),
        (("sample", "num_images=3"), "count"),
        (("sample", "output_dir=x"), "out"),
        (("sample", "model=x"), "backbone"),
        (("evaluate", "num_images=3"), "images"),
        (("export", "output=x"), "out"),
        (("data", "world", "output_dir=x"), "out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_verb_names_its_own_option(words: tuple[str, ...], key: str, capsys: Printed) -> None:
    assert main([*words]) == BAD_RECIPE
    name = words[-1].partition("=")[0]
    assert capsys.readouterr().err == f"error: {name}: no such key; did you mean {key}?\n"


def test_what_is_no_option_of_a_verb_is_not_hinted(capsys: Printed) -> None:
    assert main(["merge", "learning_rate=3"]) == BAD_RECIPE
    assert "optim.lr" not in capsys.readouterr().err


def test_dashes_are_not_for_keys(capsys: Printed) -> None:
    assert main(["check", "recipe=lora", "--run.steps=3"]) == BAD_RECIPE
    assert capsys.readouterr().err.endswith("as in optim.lr=1e-4; leave the dashes out\n")


@pytest.mark.parametrize("word", SYNONYMS)
def test_help_explains_each_of_them(word: str, capsys: Printed) -> None:
    """Unless the word is an option here too, which then is explained."""
    assert main(["help", word]) == 0
    out = capsys.readouterr().out
    first, *rest = out.splitlines()
    if first.startswith(f"{word} is called "):
        assert first == f"{word} is called {' or '.join(SYNONYMS[word])} here"
        assert len(rest) > 1 and len(rest[1]) > 3
    else:
        assert word in out
