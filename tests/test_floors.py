"""The layout of the house, from its source alone: what may import what, what is called how, and
how long it may be. Each rule is also tried on a package that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).parent.parent / "trainer"
Rule = Callable[[Path], list[str]]

# rule: how many breaches it lets pass, and a package of which file says what to break it
RULES: dict[str, tuple[Rule, int, dict[str, str]]] = {
    "rooms_without_floor": (house.rooms_without_floor, 0, {"attic/box.py": ""}),
    "upward_imports": (
        house.upward_imports,
        0,
        {"ops/a.py": "def f():\n    from trainer.methods import b\n", "methods/b.py": ""},
    ),
    "upward_imports_for_types": (
        house.upward_imports,
        0,
        {
            "data/a.py": "if TYPE_CHECKING:\n    from trainer.cli.b import c\n",
            "cli/b.py": "c = 1\n",
        },
    ),
    "neighbours_both_ways": (
        house.neighbours_both_ways,
        0,
        {
            "ops/a.py": "import trainer.backbones.b\n",
            "ops/c.py": "",
            "backbones/b.py": "",
            "backbones/d.py": "from trainer.ops.c import e\n",
        },
    ),
    "import_circles": (
        house.import_circles,
        0,
        {
            "ops/a.py": "from trainer.ops.b import c\n",
            "ops/b.py": "from trainer.ops.c import c\n",
            "ops/c.py": "def c():\n    from trainer.ops.a import a\n",
        },
    ),
    "foreign_names": (
        house.foreign_names,
        0,
        {"methods/map/two_words.py": "", "attention/a.py": '"""As in Two-Words."""\n'},
    ),
    "foreign_names_of_families": (
        house.foreign_names,
        0,
        {"backbones/tower.py": "\nFAMILY = Family(\n", "attention/a.py": "TowerProcessor = 1\n"},
    ),
    "loose_modules": (
        house.loose_modules,
        0,
        {"__main__.py": "", "continual.py": "", "third.py": "", "fourth.py": ""},
    ),
    "repeated_file_names": (
        house.repeated_file_names,
        0,
        {"data/a.py": "", "media/a.py": "", "cli/b.py": "", "data/b.py": ""},
    ),
    "repeated_public_names": (
        house.repeated_public_names,
        0,
        {"data/a.py": "def f(): ...\n", "media/b.py": "class f: ...\n"},
    ),
    "long_functions": (
        house.long_functions,
        house.LONG_FUNCTIONS,
        {f"data/a{n}.py": "def f():\n" + "    1\n" * 40 for n in range(6)},
    ),
    "long_files": (
        house.long_files,
        house.LONG_FILES,
        {f"data/a{n}.py": "1\n" * 321 for n in range(6)},
    ),
    "crowded_calls": (house.crowded_calls, 0, {"data/a.py": "f(1, 2, 3, 4)\nmax(1, 2, 3, 4)\n"}),
}
each_rule = pytest.mark.parametrize("name", RULES)


@each_rule
def test_the_house_keeps_its_rules(name: str) -> None:
    rule, allowed, _ = RULES[name]
    found = rule(ROOT)
    assert len(found) <= allowed, "\n".join(found)


@each_rule
def test_a_breach_is_noticed(name: str, tmp_path: Path) -> None:
    rule, allowed, files = RULES[name]
    root = tmp_path / "trainer"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    assert len(rule(root)) > allowed


def test_what_is_in_order_passes(tmp_path: Path) -> None:
    """Imports downwards, a verb named as its function, a kernel as its method, three arguments."""
    files = {
        "cli/lay.py": "from trainer.methods.map.brick import brick\n",
        "methods/map/brick.py": "from trainer.kernels.brick import lay\n",
        "kernels/brick.py": "def lay(a, b):\n    return f(1, 2, 3) + f(1, 2, *a) + f(1, d=2)\n",
        "export/formats/brick.py": "def write(): ...\n",
        "export/formats/stone.py": "def write(): ...\n",
        "runs/lay.py": "def _lay(): ...\n",
        "attention/a.py": '"""Bricks and full walls."""\n',
    }
    root = tmp_path / "trainer"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    assert [breach for rule, _, _ in RULES.values() for breach in rule(root)] == []
