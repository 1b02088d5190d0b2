"""Files of other tools: each is made by the tool itself, or by its documented layout, and read; the
weights of the adapted model are the writer's, or the file is refused by what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign.case import Case
from foreign.table import END, PAGE, READ, REFUSED, START, cases, expected, outcome


@pytest.fixture(scope="module")
def bases(
    tiny_folder: Path, dit_folder: Path, open_folder: Callable[[Path], Any]
) -> dict[str, Any]:
    return {"tiny": open_folder(tiny_folder), "dit": open_folder(dit_folder)}


FUSED = [case for case in cases() if "OpenCLIP" in case.kind]  # rows of q, k and v in one matrix
OTHERS = [case for case in cases() if case not in FUSED]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.kind)
def test_layers_by_the_names_of_openclip(case: Case, bases: dict[str, Any], tmp_path: Path) -> None:
    found, said = outcome(case, bases[case.backbone], tmp_path)
    assert found == (REFUSED if case.refused else READ), said


@pytest.mark.sampled(14)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"{case.tool}: {case.kind}")
def test_a_file_is_read_right_or_refused_by_name(
    case: Case, bases: dict[str, Any], tmp_path: Path
) -> None:
    if case.tool == "LyCORIS":
        pytest.importorskip("lycoris")
    found, said = outcome(case, bases[case.backbone], tmp_path)
    assert found == (REFUSED if case.refused else READ), said


def test_the_page_has_the_table() -> None:
    """After a new case: `PYTHONPATH=.:tests python -m foreign.table`."""
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(START)[2].partition(END)[0] == expected()
