"""Running out of memory is told with what to do about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer import __main__
from trainer.common.out_of_memory import out_of_memory


def test_a_tensor_too_large_for_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def huge(verb: str, words: list[str]) -> int:
        return len(torch.empty(2**47, dtype=torch.float64))

    monkeypatch.setattr(__main__, "_run", huge)
    assert __main__.main(["sample"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: ") and "run.batch_size" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        MemoryError(),
    ],
)
def test_what_is_known(error: BaseException) -> None:
    found = out_of_memory(error)
    assert found is not None and "run.gradient_checkpointing=true" in found


def test_another_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(verb: str, words: list[str]) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(__main__, "_run", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        __main__.main(["sample"])
