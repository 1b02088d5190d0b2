"""The table of all methods in `docs/methods.md`, made from what methods and recipes declare."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.common.declared import Declared, declared, header_of, measured_in
from trainer.common.lookup import LEVELS, method_files
from trainer.common.paths import RECIPES
from trainer.config.load import read_recipe
from trainer.config.tree import read_yaml

TITLE = """# Methods

Every method there is, by the level of the survey it belongs to. Made by

    python -m trainer list methods format=markdown > docs/methods.md

from what each method's file and each recipe's header say; change those, not this page.
`python -m trainer help methods.<name>` prints the options of one.

Kinds are applied in this order: structure inserts layers, attention replaces what sites compute,
storage packs frozen weights, adapt puts adapters on layers, select unfreezes weights of the base.
Use says whether a method is trained, optimises something of each picture, or acts while sampling.
"""
COLUMNS = ("system", "method", "kind", "use", "paper", "recipes", "measured")


def methods_table() -> str:
    """The page as Markdown."""
    methods = [declared(path) for path in method_files()]
    parts = [TITLE]
    for level in LEVELS:
        own = [method for method in methods if method.level == level]
        if own:
            parts.append(f"\n## {level.capitalize()} level\n\n")
            parts.append("".join(map(_line, [COLUMNS, ["---"] * len(COLUMNS), *map(_row, own)])))
    return "".join(parts)


def recipes_of(method: str) -> list[str]:
    """The recipes whose own file names the method, those of `edit` as edit/<name>: the one of its
    name first, then those with the fewest methods."""
    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        if method in _named(read_yaml(path)):
            used = read_recipe(path.stem)["methods"]
            count = sum(values is not None for values in used.values())
            found.append((path.stem != method, count, path.stem))
    for path in sorted((RECIPES / "edit").glob("*.yaml")):
        if method in _named(own := read_yaml(path)):
            found.append((path.stem != method, len(own["methods"]), f"edit/{path.stem}"))
    return [name for _, _, name in sorted(found)]


def _named(tree: Mapping[str, Any]) -> set[str]:
    """The methods that a recipe's own file adds, for all backbones or for one; `families` adds
    none."""
    parts = [tree, *(tree.get("backbones") or {}).values()]
    return {
        name
        for part in parts
        for name, options in ((part or {}).get("methods") or {}).items()
        if options is not None
    }


def _row(method: Declared) -> list[str]:
    recipes = recipes_of(method.name)
    sentences = (measured_in(header_of(RECIPES / f"{name}.yaml")) for name in recipes)
    measured = next(filter(None, sentences), "").removeprefix("Measured ")
    code = f"[`{method.name}`](../trainer/methods/{method.level}/{method.name}.py)"
    named = ", ".join(f"[`{name}`](../recipes/{name}.yaml)" for name in recipes)
    return [method.systems, code, method.kind, method.use, _linked(method.paper), named, measured]


def _linked(paper: str) -> str:
    """arXiv numbers as links."""
    link = r"[\1](https://arxiv.org/abs/\1)"
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", link, paper)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"
