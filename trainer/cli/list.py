"""`list`: prints the recipes, backbones, methods and data sources there are: the first two as
tables, the others a sentence each.

Methods and data sources are read as text, recipes and backbones as YAML; torch and diffusers are
not imported.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trainer.common.declared import Declared, declared, docstring_summary, header_of
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.lookup import method_files, source_files
from trainer.common.paths import BACKBONES, RECIPES

WIDTH, INDENT = 100, 22
MARKDOWN = "format=markdown"


def run(words: list[str]) -> int:
    """`python -m trainer list [recipes|edits|backbones|methods|data]` prints what there is; `list
    methods format=markdown` prints docs/methods.md, `list backbones format=markdown`
    docs/backbones.md."""
    wanted = [word for word in words if word != MARKDOWN]
    if unknown := [word for word in wanted if word not in TABLES]:
        print(f"error: list {unknown[0]}: there are {', '.join(TABLES)}", file=sys.stderr)
        return BAD_RECIPE
    if MARKDOWN in words:
        return _markdown(wanted)
    for kind in wanted or TABLES:
        print(f"{kind}:")
        columns, rows = TABULAR[kind]() if kind in TABULAR else ((), [])
        if rows:
            _print_table(columns, rows)
        tabled = {row[0] for row in rows}
        for name, sentence in TABLES[kind]():
            if name not in tabled:
                print(entry(name, sentence))
    return 0


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=WIDTH - 2, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(f"  {line}".rstrip() for line in captured.get().splitlines()))


def entry(name: str, text: str, indent: int = INDENT) -> str:
    """A name and a text beside it, wrapped; a name that is too long gets a line of its own."""
    lines = textwrap.wrap(text, WIDTH - indent) or [""]
    if len(name) + 3 > indent:
        return "\n".join([f"  {name}", *(" " * indent + line for line in lines)])
    return "\n".join([f"  {name}".ljust(indent) + lines[0], *(" " * indent + x for x in lines[1:])])


def sentence_of(method: Declared) -> str:
    """What it is, then its level, its kind and where it is described."""
    paper = f" ({method.paper})" if method.paper else ""
    use = "" if method.use == "train" else f", to {method.use} with"
    return f"{method.summary} A method of the {method.level} level, kind {method.kind}{use}{paper}."


def _methods() -> Iterable[tuple[str, str]]:
    return ((path.stem, sentence_of(declared(path))) for path in method_files())


def _sources() -> Iterable[tuple[str, str]]:
    return ((path.stem, docstring_summary(path)) for path in source_files())


def _headers(folder: Path) -> Callable[[], Iterable[tuple[str, str]]]:
    def rows() -> Iterable[tuple[str, str]]:
        return ((path.stem, header_of(path)[0]) for path in sorted(folder.glob("*.yaml")))

    return rows


def _of_backbones() -> tuple[Sequence[str], list[Sequence[str]]]:
    """Those of the hub; of the others there is a sentence."""
    from trainer.cli.backbones_table import listed_backbones

    columns = ("name", "family", "pixels", "predicts", "parameters", "memory", "licence")
    found = [each for each in listed_backbones() if each.hub]
    return columns, [[each.cell(column) for column in columns] for each in found]


def _of_recipes() -> tuple[Sequence[str], list[Sequence[str]]]:
    from trainer.config.load import read_recipe, recipe_names

    rows: list[Sequence[str]] = []
    for name in recipe_names():
        tree = read_recipe(name)
        methods = [
            each for each, options in (tree.get("methods") or {}).items() if options is not None
        ]
        title = header_of(RECIPES / f"{name}.yaml")[0].partition(": ")[0]
        rows.append([name, str(tree.get("backbone") or ""), ", ".join(methods), title])
    return ("name", "backbone", "methods", "what"), rows


TABULAR: dict[str, Callable[[], tuple[Sequence[str], list[Sequence[str]]]]] = {
    "recipes": _of_recipes,
    "backbones": _of_backbones,
}
TABLES: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "recipes": _headers(RECIPES),
    "edits": _headers(RECIPES / "edit"),
    "backbones": _headers(BACKBONES),
    "methods": _methods,
    "data": _sources,
}


def _markdown(wanted: list[str]) -> int:
    if wanted == ["methods"]:
        from trainer.cli.methods_table import methods_table

        print(methods_table(), end="")
    elif wanted == ["backbones"]:
        from trainer.cli.backbones_table import backbones_markdown

        print(backbones_markdown(), end="")
    else:
        print(f"error: {MARKDOWN} is for list methods or list backbones", file=sys.stderr)
        return BAD_RECIPE
    return 0
