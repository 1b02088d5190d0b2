"""The selector grammar, and that reading it does not load torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from trainer.attention.selector import parse_selector


@dataclass(frozen=True)
class Spot:
    name: str
    kind: str
    place: str
    divisor: int | None
    depth: float


SPOTS = [
    Spot("down_blocks.0.attn1", "self", "down", 1, 0.0),
    Spot("down_blocks.0.attn2", "cross", "down", 1, 0.2),
    Spot("down_blocks.0.motion", "temporal", "down", 1, 0.4),
    Spot("mid_block.attn2", "cross", "mid", 2, 0.6),
    Spot("up_blocks.0.attn1", "self", "up", 2, 0.8),
    Spot("odd.attn1", "self", "block", None, 1.0),
]


def chosen(text: str) -> list[str]:
    selector = parse_selector(text)
    return [spot.name for spot in SPOTS if selector.matches(spot)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("self", [0, 4, 5]),
        ("cross", [1, 3]),
        ("all", [0, 1, 3, 4, 5]),
        ("temporal", [2]),
        ("all | temporal", [0, 1, 2, 3, 4, 5]),
        ("cross&!mid", [1]),
        (" self & up | mid ", [3, 4]),
        ("/2", [3, 4]),
        ("!/2", [0, 1, 5]),
        ("block", [5]),
        ("name:*attn2", [1, 3]),
        ("name:down_blocks*", [0, 1, 2]),
        ("!name:down_blocks*", [3, 4, 5]),
        ("!name:mid*", [0, 1, 4, 5]),
        ("down", [0, 1]),
        ("!cross", [0, 4, 5]),
        ("!temporal", [0, 1, 3, 4, 5]),
        ("temporal & up", []),
        ("! self & down", [1]),
        ("depth>=0.6", [3, 4, 5]),
        ("self & depth>= 0.81 | cross & !depth>=.3", [1, 5]),
    ],
)
def test_selector_chooses(text: str, expected: list[int]) -> None:
    assert chosen(text) == [SPOTS[index].name for index in expected]


@pytest.mark.parametrize(
    ("text", "word", "nearest"),
    [
        ("cros & down", "cros", "'cross'"),
        ("cross | tmporal", "tmporal", "'temporal'"),
        ("!middle", "middle", None),
        ("/x", "/x", None),
        ("/0", "/0", None),
        ("name:", "name:", None),
        ("depth>=2", "depth>=2", None),
        ("depth>=nan", "depth>=nan", None),
        ("depth>0.5", "depth>0.5", "'depth>=0.5'"),
        ("Self", "Self", "'self'"),
    ],
)
def test_unknown_term_is_refused_by_name(text: str, word: str, nearest: str | None) -> None:
    with pytest.raises(ValueError, match="unknown term") as caught:
        parse_selector(text)
    message = str(caught.value)
    assert repr(word) in message
    assert "self, cross, joint, temporal, all, down, mid, up, block" in message
    if nearest is not None:
        assert f"did you mean {nearest}?" in message


@pytest.mark.parametrize("text", ["", "cross &", "| mid", "!"])
def test_empty_term_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="empty term"):
        parse_selector(text)


def test_parsing_does_not_import_torch() -> None:
    code = (
        "import sys; from trainer.attention.sites import parse_selector; parse_selector('cross');"
        "heavy = {'torch', 'diffusers', 'numpy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
