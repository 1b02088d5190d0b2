"""`completion`: prints what completes these commands in bash or zsh."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trainer.cli.usage import VERBS
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.paths import PACKAGE
from trainer.common.program import program
from trainer.common.section import keys_of

if TYPE_CHECKING:
    from pydantic import BaseModel

SHELLS = PACKAGE / "cli" / "shells"
Values = dict[str, list[str]]  # by option


def run(words: list[str]) -> int:
    """`source <(python -m trainer completion bash)` in ~/.bashrc, or the same with zsh in ~/.zshrc,
    completes verbs, recipes, backbones, keys and values where TAB is pressed, after `python -m
    trainer` and `attention-trainer`. The words are those of this version: nothing is started when
    TAB is pressed."""
    if len(words) != 1 or words[0] not in ("bash", "zsh"):
        said = f"completion {' '.join(words)}".strip()
        line = f"error: {said}: give the shell, as in `{program()} completion bash` or zsh"
        print(line, file=sys.stderr)
        return BAD_RECIPE
    shell = words[0]
    print(f"# Completes {program()} in {shell}; printed by `{program()} completion {shell}`.")
    print("\n".join(_functions()))
    for name in ("words", shell):
        print("\n" + (SHELLS / f"{name}.sh").read_text(encoding="utf-8").rstrip())
    return 0


def _functions() -> Iterator[str]:
    """Shell functions that print every word there is at a place, a line each.

    `_attention_trainer_words <command> <typed>`: command is the verb, or `data` and its command;
    typed the beginning of the current word, whose key decides which values there are.
    """
    keys, values = _of_recipes()
    yield "_attention_trainer_recipe() {"
    yield '  case "$1" in'
    yield from _value_cases("", values)
    yield f"  *) {_print(keys)} ;;"
    yield from ("  esac", "}", "", "_attention_trainer_words() {", '  case "$1:$2" in')
    for command, words in _plain_words().items():
        yield f"  {shlex.quote(f'{command}:')}*) {_print(words)} ;;"
    yield from _option_cases()
    yield from ("  esac", "}")


def _plain_words() -> dict[str, Iterable[str]]:
    """What may follow a verb without options; the verbs themselves by the empty name."""
    from trainer.cli.data import COMMANDS
    from trainer.cli.help import topics
    from trainer.cli.list import TABLES

    return {
        "": VERBS,
        "data": COMMANDS,
        "list": TABLES,
        "completion": ("bash", "zsh"),
        "help": topics(),
    }


def _option_cases() -> Iterator[str]:
    """The options of each command that has some, and their values."""
    from trainer.cli.edit_options import edit_recipes
    from trainer.cli.help_pages import command_records
    from trainer.cli.options import RecipeOptions
    from trainer.config.lineage import backbone_names
    from trainer.export.find_format import format_names

    known: dict[str, Values] = {
        "edit": {"recipe": edit_recipes(), "method": edit_recipes()},
        "export": {"format": [*format_names()]},
        "import": {"format": ["auto", *format_names()]},
    }
    for command, record in command_records().items():
        values = _values("", record) | known.get(command, {})
        if "backbone" in keys_of(record):
            values["backbone"] = backbone_names()
        yield from _value_cases(f"{command}:", values)
        names = [*keys_of(record), *(_of_edits() if command == "edit" else ())]
        own = _print(f"{name}=" for name in names)
        more = '; _attention_trainer_recipe "$2"' if issubclass(record, RecipeOptions) else ""
        yield f"  {shlex.quote(f'{command}:')}*) {own}{more} ;;"


def _of_edits() -> Iterator[str]:
    """The keys of methods that have a recipe of `edit`."""
    from trainer.cli.edit_options import edit_recipes
    from trainer.methods.apply import find_method

    for method in edit_recipes():
        for name in keys_of(find_method(method)):
            yield f"methods.{method}.{name}"


def _of_recipes() -> tuple[list[str], Values]:
    """The keys of a recipe with an = behind each, and the values of those that take a few words."""
    from trainer.cli.option_pages import homes
    from trainer.config.lineage import backbone_names
    from trainer.config.load import recipe_names
    from trainer.config.schema import TRACKERS
    from trainer.data.source import Source
    from trainer.methods.apply import method_names

    values: Values = {
        "recipe": recipe_names(),
        "backbone": backbone_names(),
        "tracker": list(TRACKERS),
        "data.source": Source.names(),
    }
    keys = [*values, *(f"methods.{name}" for name in method_names())]
    for home in homes(""):
        if home.key:
            keys += [f"{home.key}.{name}" for name in keys_of(home.record)]
            values |= _values(f"{home.key}.", home.record)
    keys += [f"optim.lrs.{name}" for name in method_names()]
    return [f"{key}=" for key in dict.fromkeys(keys)], values


def _values(start: str, record: type[BaseModel]) -> Values:
    from trainer.common.field_words import words_of_choice

    found = {start + name: words_of_choice(field) for name, field in keys_of(record).items()}
    return {name: words for name, words in found.items() if words}


def _value_cases(start: str, values: Values) -> Iterator[str]:
    for key, words in values.items():
        yield f"  {shlex.quote(f'{start}{key}=')}*) {_print(f'{key}={word}' for word in words)} ;;"


def _print(words: Iterable[str]) -> str:
    return f"printf '%s\\n' {shlex.join(words)}"
