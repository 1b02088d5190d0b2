"""`list`: prints the recipes, backbones, methods and data sources there are, a sentence each.

They are read as text, so nothing heavy is imported.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.common.declared import Declared, declared, docstring_summary, header_of
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.lookup import method_files, source_files
from trainer.common.paths import BACKBONES, RECIPES

WIDTH, INDENT = 100, 22
MARKDOWN = "format=markdown"


def run(words: list[str]) -> int:
    """`python -m trainer list [recipes|backbones|methods|data]` prints what there is, a sentence
    each; `list methods format=markdown` prints docs/methods.md."""
    wanted = [word for word in words if word != MARKDOWN]
    if unknown := [word for word in wanted if word not in TABLES]:
        print(f"error: list {unknown[0]}: there are {', '.join(TABLES)}", file=sys.stderr)
        return BAD_RECIPE
    if MARKDOWN in words:
        return _markdown(wanted)
    for kind in wanted or TABLES:
        print(f"{kind}:")
        for name, sentence in TABLES[kind]():
            print(entry(name, sentence))
    return 0


def entry(name: str, text: str, indent: int = INDENT) -> str:
    """A name and a text beside it, wrapped; a name that is too long gets a line of its own."""
    lines = textwrap.wrap(text, WIDTH - indent) or [""]
    if len(name) + 3 > indent:
        return "\n".join([f"  {name}", *(" " * indent + line for line in lines)])
    return "\n".join([f"  {name}".ljust(indent) + lines[0], *(" " * indent + x for x in lines[1:])])


def sentence_of(method: Declared) -> str:
    """What it is, then its level, its kind and where it is described."""
    paper = f" ({method.paper})" if method.paper else ""
    return f"{method.summary} A method of the {method.level} level, kind {method.kind}{paper}."


def _methods() -> Iterable[tuple[str, str]]:
    return ((path.stem, sentence_of(declared(path))) for path in method_files())


def _sources() -> Iterable[tuple[str, str]]:
    return ((path.stem, docstring_summary(path)) for path in source_files())


def _headers(folder: Path) -> Callable[[], Iterable[tuple[str, str]]]:
    def rows() -> Iterable[tuple[str, str]]:
        return ((path.stem, header_of(path)[0]) for path in sorted(folder.glob("*.yaml")))

    return rows


TABLES: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "recipes": _headers(RECIPES),
    "backbones": _headers(BACKBONES),
    "methods": _methods,
    "data": _sources,
}


def _markdown(wanted: list[str]) -> int:
    if wanted != ["methods"]:
        print(f"error: {MARKDOWN} is for list methods alone", file=sys.stderr)
        return BAD_RECIPE
    from trainer.cli.methods_table import methods_table

    print(methods_table(), end="")
    return 0
