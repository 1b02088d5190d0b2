"""What is found by the name of its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.backbones.families import family_names
from trainer.common.lookup import method_files, source_files
from trainer.export.find_format import format_names


@pytest.mark.parametrize("names", [family_names, format_names, method_files, source_files])
def test_the_files_are_looked_for_once(
    names: Callable[[], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that is read, or a backbone that is loaded, asks for them many times."""
    found = names()
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("they are looked for again"))
    assert names() == found and found
