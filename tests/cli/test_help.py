"""`help`: every option of every record has a meaning, and every topic a page."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from trainer.__main__ import main
from trainer.backbones.spec import BackboneSpec, TransformerSpec, UNetSpec
from trainer.cli.calibrate import CalibrateOptions
from trainer.cli.data import COMMANDS
from trainer.cli.edit_options import with_recipe
from trainer.cli.help import _pages
from trainer.cli.help_pages import example_of
from trainer.cli.options import RecipeOptions, read_options, split_options
from trainer.cli.sample_options import SampleOptions
from trainer.cli.usage import LIGHT_VERBS, VERBS, verb_module
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.field_words import Called, default_of, needed, type_of
from trainer.common.section import keys_of
from trainer.config.load import load_recipe, methods_of
from trainer.config.overrides import parse_words
from trainer.config.schema import KEYS, SECTIONS
from trainer.data.source import Source
from trainer.methods.apply import find_method, method_names

Printed = pytest.CaptureFixture[str]
WITHOUT_OPTIONS = ("data", *LIGHT_VERBS)
RECORDS: dict[str, type[BaseModel]] = {
    **SECTIONS,
    **{f"methods.{name}": find_method(name) for name in method_names()},
    **{f"data.{name}": Source.find(name) for name in Source.names()},
    **{spec.__name__: spec for spec in (UNetSpec, TransformerSpec, BackboneSpec)},
    **{f"data {name}": options for name, (_, options) in COMMANDS.items()},
    **{
        f"verb {verb}": getattr(verb_module(verb), f"{verb.capitalize()}Options")
        for verb in VERBS
        if verb not in WITHOUT_OPTIONS
    },
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_option_says_what_it_means(name: str) -> None:
    for option, field in keys_of(RECORDS[name]).items():
        assert field.description, f"{name}.{option} has no description"
        assert not field.description.endswith(".")  # `help` ends the sentence
        assert field.description != option
        assert type_of(field) and "Annotated" not in type_of(field)


def page(capsys: Printed, *topic: str) -> str:
    assert main(["help", *topic]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("topic", _pages())
def test_every_topic_has_a_page_of_100_columns(topic: str, capsys: Printed) -> None:
    out = page(capsys, *topic.split())
    assert len(out) > 40
    wrapped = [line for line in out.splitlines() if "python -m trainer" not in line]
    if not topic.startswith(("recipe.", "backbone.")):  # the headers of files stay as they are
        assert max(map(len, wrapped)) <= 100
    if topic in RECORDS:
        listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
        assert set(keys_of(RECORDS[topic])) <= listed


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", RECORDS)
def test_every_option_has_a_page(name: str, capsys: Printed) -> None:
    """By its key in a recipe, or, of a verb, behind the verb; and by its own name alone."""
    if name == "BackboneSpec":  # of a backbone's own file
        return
    home = "denoiser" if name.endswith("Spec") else name.removeprefix("verb ")
    for option in keys_of(RECORDS[name]):
        for topic in (f"{home}.{option}", f"{home} {option}", option):
            out = page(capsys, topic)
            if topic in _pages():  # `denoiser` and `methods` are keys of recipes too
                continue
            assert f"  {option} " in out or f".{option} " in out or f".{option}\n" in out, topic


@pytest.mark.parametrize("key", [*KEYS, "base", "families", "backbones", "data.source"])
def test_every_key_of_a_recipe_has_a_page(key: str, capsys: Printed) -> None:
    assert len(page(capsys, key)) > 40


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("run.steps=400", "run.steps"),
        ("recipe=lora", "recipe=lora"),
        ("optim.lrs.lora", "optim.lrs"),
        ("run.timeouts.step", "run.timeouts"),
        ("sample prompt", "prompt (option of sample)"),
        ("data world out", "out (option of data world)"),
        ("data.concept.token", "data.token (source concept)"),
        ("lr", "optim.lr"),
        ("learning_rate", "learning_rate is called optim.lr here"),
        ("optim.learning_rate", "learning_rate is called optim.lr here"),
        ("model", "model is called backbone here"),
    ],
)
def test_a_key_as_it_is_typed(typed: str, first: str, capsys: Printed) -> None:
    assert page(capsys, *typed.split()).splitlines()[0] == first


def test_a_name_that_several_have_shows_them_all(capsys: Printed) -> None:
    out = page(capsys, "rank").splitlines()
    assert {"methods.lora.rank", "methods.dora.rank", "rank (option of export)"} <= set(out)
    assert out[0].startswith("methods.")


def test_page_of_a_method(capsys: Printed) -> None:
    out = page(capsys, "methods.dora")
    assert out.startswith("methods.dora: DoRA\n\nDoRA: the length and the direction of each row")
    assert "A method of the weight level, kind adapt (arXiv 2402.09353)." in " ".join(out.split())
    assert "\n  python -m trainer fit recipe=dora\n" in out
    row = "  rank                whole number, at least 1; default 4\n"
    assert row + " " * 22 + "r, the rows of A and columns of B.\n" in out


def test_page_of_one_option(capsys: Printed) -> None:
    assert page(capsys, "run.steps") == (
        "run.steps\n  run.steps           whole number, at least 1; default 1000\n"
        "                      optimiser steps of the run.\n"
    )
    assert page(capsys, "methods.c_lora.rank").splitlines()[1].endswith("default 16")
    flip = page(capsys, "data.flip")
    assert [line for line in flip.splitlines() if line.startswith("data.flip (")] == [
        "data.flip (source concept)",
        "data.flip (source folder)",
        "data.flip (source video)",
    ]


def test_page_of_a_verb(capsys: Printed) -> None:
    out = page(capsys, "sample")
    assert out == page_of(["sample", "--help"], capsys)
    assert "  prompt              text or null; default null\n" in out
    assert "  size                512, or 768x512, or null; default null\n" in out
    assert "  from                path or null; default null\n" in out
    example = 'sample adapter=runs/custom_diffusion/<id> prompt="a <v1> on a blue background"'
    assert f"\n  python -m trainer {example}\n" in out
    assert "  count               whole number, at least 1; default 1\n" in out
    fit = page(capsys, "fit")
    assert "\n  python -m trainer fit recipe=custom_diffusion\n" in fit and "help recipe" in fit
    assert page(capsys, "data", "world") == page_of(["data", "world", "-h"], capsys)


def page_of(words: list[str], capsys: Printed) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("lora", "did you mean methods.lora or recipe.lora?"),
        ("methods.selectve", "did you mean methods.selective?"),
        ("optm", "did you mean optim?"),
        ("optim.lrr", "did you mean optim.lr?"),
        ("methods.lora.rnk", "did you mean methods.lora.rank?"),
        ("pix2vido", "did you mean methods.pix2video?"),
        ("smple", "did you mean sample?"),
        ("stps", "did you mean steps?"),
        ("qqq", "`help` alone lists them"),
    ],
)
def test_misspelt_topic(topic: str, hint: str, capsys: Printed) -> None:
    assert main(["help", topic]) == BAD_RECIPE
    assert capsys.readouterr() == ("", f"error: help {topic}: no such topic; {hint}\n")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from trainer.__main__ import main\n"
        "for topic in ('methods.lora', 'run', 'data.concept', 'run.steps', 'sample', 'fit'):\n"
        "    main(['help', topic])\n"
        "print('loaded:', {'torch', 'diffusers', 'transformers', 'lightning'} & set(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert printed.stdout.splitlines()[-1] == "loaded: set()"


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", method_names())
def test_the_example_of_a_method_can_be_run(name: str) -> None:
    python, _, trainer, verb, *words = shlex.split(example_of(name))
    assert (python, trainer) == ("python", "trainer")
    if verb == "sample":
        options = read_options([w for w in words if not w.startswith("source=")], SampleOptions)
        assert name in (options.methods or {})
        return
    if verb == "edit":
        given = with_recipe(parse_words(words))
        assert name in methods_of(given["methods"])
        return
    assert verb in ("fit", "calibrate")
    _, rest = split_options(words, CalibrateOptions if verb == "calibrate" else RecipeOptions)
    assert name in load_recipe(rest).methods


class Record(BaseModel):
    whole: int = Field(3, gt=0, lt=10)
    share: float | None = Field(None, gt=0, le=1)
    choice: Literal["a", "b", 4] = "a"
    names: tuple[str, ...] = Field((), min_length=1)
    pair: tuple[int, float] = (1, 2.5)
    table: dict[str, int] = Field(default_factory=dict)
    named: Annotated[str, Called("site selector")] = ""
    inside: Annotated[int, Field(ge=2)] | None = None
    on: bool = True
    needs: str


@pytest.mark.parametrize(
    ("name", "kind", "default", "wanted"),
    [
        ("whole", "whole number, at least 1 and below 10", "default 3",
         "a whole number is needed, at least 1 and below 10"),
        ("share", "number, above 0 and at most 1, or null", "default null",
         "a number is needed, above 0 and at most 1"),
        ("choice", "a, b or 4", "default a", "a, b or 4 is needed"),
        ("names", "list of text, not empty", "default []", None),
        ("pair", "list of 2: whole number, number", "default [1, 2.5]", None),
        ("table", "mapping of text to whole number", "default {}", None),
        ("named", "site selector", 'default ""', "a site selector is needed"),
        ("inside", "whole number, at least 2, or null", "default null",
         "a whole number is needed, at least 2"),
        ("on", "true or false", "default true", "true or false is needed"),
        ("needs", "text", "required", "text is needed"),
    ],
)  # fmt: skip
def test_types_in_plain_words(name: str, kind: str, default: str, wanted: Any) -> None:
    field = Record.model_fields[name]
    assert (type_of(field), default_of(field), needed(field)) == (kind, default, wanted)
