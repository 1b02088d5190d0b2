"""Figures in the heads of recipes: each stands beside the command that made it, and is in the file
that the command wrote, with its commit and date."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FIGURE = re.compile(r"(\d+(?:\.\d+)?) %(?! interval)")
COMMAND = re.compile(r"`python (?:bench/\w+\.py|-m trainer evaluate)[^`]*`")
FILE = re.compile(r"bench/results/\w+\.(?:json|md)")
OPTIONS = {"agent_attention": "40"}  # what an option does, measured by nobody
# beside their command, `evaluate`, of which no file is kept; to be measured anew by one of bench/
NO_FILE = {"make_a_video", "vdm"}
DERIVED = {"unet_scratch"}  # differences of figures in the file


def paragraphs(recipe: Path) -> Iterator[str]:
    """Of its head, on one line each."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = "\n".join(line.removeprefix("#").strip() for line in head)
    for part in re.split(r"\n\n|\n(?=Needs: |Measured by )", text):
        yield " ".join(part.split())


def figures_of(recipe: Path) -> list[tuple[str, str]]:
    """Each figure in per cent, with its paragraph."""
    return [
        (figure, text)
        for text in paragraphs(recipe)
        for figure in FIGURE.findall(text)
        if figure != OPTIONS.get(recipe.stem)
    ]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield float(value)


def is_in(figure: str, found: dict[str, Any]) -> bool:
    """Whether a share in the file rounds to a figure in per cent."""
    digits = len(figure.partition(".")[2])
    return any(abs(100 * x - float(figure)) <= 0.5001 / 10**digits for x in numbers(found))


MEASURED = [recipe for recipe in RECIPES if figures_of(recipe)]


@pytest.mark.parametrize("recipe", MEASURED, ids=lambda recipe: recipe.stem)
def test_a_figure_is_beside_its_command_and_in_its_file(recipe: Path) -> None:
    for figure, text in figures_of(recipe):
        assert COMMAND.search(text), f"no command beside {figure} % in: {text}"
        if recipe.stem in NO_FILE:
            continue
        named = [ROOT / name for name in FILE.findall(text)]
        assert named and all(path.is_file() for path in named), f"no file with {figure} %: {text}"
        files = [path.with_suffix(".json") for path in named]
        kept = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        assert all(set(each["figures"]) - {"commit", "date"} <= set(each["taken"]) for each in kept)
        if recipe.stem not in DERIVED:
            assert any(is_in(figure, each["figures"]) for each in kept), (figure, text)


def test_what_is_looked_for_is_found() -> None:
    """A figure without a command, and one that no file has."""
    assert len(MEASURED) > 15
    assert FIGURE.findall("right in 97 % (95 % interval 84 to 99) and 4.5 %") == ["97", "4.5"]
    assert not COMMAND.search("right in 97 % of pictures")
    shares = {"a": {"measured": 0.96875}, "b": [0.425]}
    assert is_in("97", shares) and is_in("96.9", shares) and is_in("42", shares)
    assert not is_in("98", shares) and not is_in("96.8", shares)


def test_every_figure_of_a_result_file_says_when_it_was_taken() -> None:
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        bare = set(kept["figures"]) - set(kept["taken"]) - {"commit", "date"}
        assert not bare, f"{path.name}: {sorted(bare)}"
        assert all("commit" in text and "threads" in text for text in kept["taken"].values())
