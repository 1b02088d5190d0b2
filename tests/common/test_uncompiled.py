"""What a plan, which computes nothing, does not wait for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trainer.common.uncompiled import UNCOMPILED, nothing_compiled


def test_a_plan_imports_no_compiler() -> None:
    """Which bitsandbytes would, that peft imports."""
    code = (
        "import sys; from trainer.__main__ import main\n"
        "main(['check', 'recipe=lora', 'plan=true'])\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "trains " in printed.stdout
    assert printed.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_afterwards_functions_are_compiled_again(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(UNCOMPILED, raising=False)
    if before is not None:
        monkeypatch.setenv(UNCOMPILED, before)
    with nothing_compiled():
        assert os.environ[UNCOMPILED] == "1"
    assert os.environ.get(UNCOMPILED) == before
