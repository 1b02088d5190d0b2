"""The verbs, and the text that `python -m trainer` prints without one; imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from trainer.common.declared import docstring_summary
from trainer.common.paths import PACKAGE

VERBS = (
    "fit", "check", "slurm", "sweep", "calibrate", "sample", "edit", "evaluate", "report", "export",
    "import", "merge", "data", "list", "completion", "help",
)  # fmt: skip
LIGHT_VERBS = ("list", "completion", "help")  # they import no torch, and take no `key=value` words
TOPICS = """
`help <verb>` prints the options of a verb, `help recipe` the keys of a recipe, `help run` or
`help optim` those of a section, `help methods.lora` or `help data.concept` those of a method or a
data source, `help run.steps` one of them. `list` prints recipes, backbones, methods and data
sources, `--version` the version of this toolkit and of its libraries. `completion bash` prints what
completes these words in a shell.

  python -m trainer fit recipe=custom_diffusion
  python -m trainer fit recipe=custom_diffusion backbone=sd15 data.concept=./my_dog
"""


def verb_module(verb: str) -> Any:
    """The file of a verb; `import` is a word of Python's own, so its file is `import_.py`."""
    return importlib.import_module(f"trainer.cli.{_stem(verb)}")


def usage() -> str:
    """Every verb with the first sentence of its file."""
    lines = ["usage: python -m trainer <verb> [key=value ...]", ""]
    for verb in VERBS:
        summary = docstring_summary(PACKAGE / "cli" / f"{_stem(verb)}.py")
        lines.append(f"  {verb:10} {summary.removeprefix(f'`{verb}`: ')}")
    return "\n".join(lines) + "\n" + TOPICS


def no_verb(word: str) -> str:
    """What to say of a word that is no verb."""
    near = difflib.get_close_matches(word, VERBS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"error: no verb is called {word!r}{hint}\n{usage()}"


def _stem(verb: str) -> str:
    return "import_" if verb == "import" else verb
