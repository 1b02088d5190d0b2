"""The table of docs/adapters.md. `PYTHONPATH=.:tests python -m foreign.table` makes
every file, reads it, and writes what came of it between the marks of that page."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foreign.case import LIMIT, Case, fresh, judge

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
START, END = "<!-- foreign files: begin -->\n", "<!-- foreign files: end -->\n"
READ, REFUSED, WRONG = "read right", "refused by name", "READ WRONG"


def cases() -> list[Case]:
    from foreign import of_layout, of_lycoris, of_peft

    return [*of_peft.CASES, *of_lycoris.CASES, *of_layout.CASES]


def outcome(case: Case, base: Any, folder: Path) -> tuple[str, str]:
    """What comes of reading a case's file, in the words of the table, and what was said of it."""
    made = case.make(fresh(base), folder)
    try:
        largest, said = judge(made, base)
    except ValueError as error:
        return (REFUSED if re.search(case.refused or r"^\b$", str(error)) else WRONG), str(error)
    return (READ if largest <= LIMIT else WRONG), f"{largest:.1e}; {said}"


def table(outcomes: Iterable[tuple[Case, str]]) -> str:
    rows = [f"| {case.tool} | {case.kind} | {found} | {case.by} |" for case, found in outcomes]
    head = ["| tool | kind of file | here | written by, and compared with |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def expected() -> str:
    """The table as the cases promise it; the test of each case holds its row."""
    return table((case, REFUSED if case.refused else READ) for case in cases())


def main() -> None:
    import conftest

    from trainer.backbones import load_backbone
    from trainer.config.lineage import backbone_spec

    with TemporaryDirectory() as scratch:
        makers = {"tiny": conftest.make_folder, "dit": conftest.make_dit_folder}
        folders = {name: make(Path(scratch) / name) for name, make in makers.items()}
        bases = {
            name: load_backbone(backbone_spec(str(folder)), str(folder)).eval()
            for name, folder in folders.items()
        }
        found = []
        for number, case in enumerate(cases()):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            what, said = outcome(case, bases[case.backbone], folder)
            print(f"{case.tool}, {case.kind}: {what} ({said})", file=sys.stderr)
            found.append((case, what))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + table(found) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
