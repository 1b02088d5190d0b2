"""What methods, recipes and data sources declare, read as text: nothing is imported."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

FACTS = ("kind", "systems", "paper", "use")  # class variables of a method, see `methods/method.py`


@dataclass(frozen=True)
class Declared:
    """A method as its file declares it. `systems`, `paper` and `use` as the file has them."""

    name: str
    level: str
    kind: str
    systems: str
    paper: str
    summary: str
    use: str = "train"


def declared(path: Path) -> Declared:
    """The declaration of the method in `trainer/methods/<level>/<name>.py`."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    facts = {
        item.target.id: ast.literal_eval(item.value)
        for node in module.body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and item.target.id in FACTS
        and item.value is not None
    }
    return Declared(path.stem, path.parent.name, summary=_summary(module), **facts)


def docstring_summary(path: Path) -> str:
    """The first paragraph of a Python file's docstring, on one line."""
    return _summary(ast.parse(path.read_text(encoding="utf-8")))


def header_of(path: Path) -> list[str]:
    """The comment lines a YAML file begins with, without their #."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines


def commands_in(lines: list[str]) -> list[str]:
    """The `python -m trainer` commands among lines, continued lines joined, comments left out."""
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = re.findall(r"^\s+(python -m trainer [^\n]*)", text, re.MULTILINE)
    return [re.sub(r"\s{2,}#.*", "", command).strip() for command in found]


def measured_in(lines: list[str]) -> str:
    """The sentence of a header that begins with `Measured by`; empty if there is none."""
    text = " ".join(line.strip() for line in lines)
    found = re.search(r"Measured by .*?(?=\. [A-Z]|\.$|\.\s*$)", text)
    return f"{found[0]}." if found else ""


def _summary(module: ast.Module) -> str:
    return " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split())
