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


def test_a_run_imports_no_compiler_either_and_can_compile_afterwards() -> None:
    code = (
        "import sys; from trainer.common.uncompiled import nothing_compiled\n"
        "with nothing_compiled(): import trainer.training.fit\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"
        "import torch; graphs = []\n"
        "def backend(graph, inputs): graphs.append(graph); return graph.forward\n"
        "torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)); print(len(graphs))"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert printed.stdout.split()[-2:] == ["False", "1"]


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
