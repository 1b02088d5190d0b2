"""`check` passes nothing that `fit` refuses before its first step, and reads no weight for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE

WORD = "data.class_word=cup"  # which a backbone of the user's needs
CLASH = ["methods.dora={sites: cross}", "methods.lora={sites: cross}"]


def check(words: list[str], capsys: Any) -> tuple[int, str]:
    code = main(["check", *words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (CLASH, "both claim"),
        (["methods.lora={sites: '*nothing*'}"], "nothing"),
        (["methods.lora={sites: null, layers: ['*no_such*']}"], "no_such"),
        (["methods.lora={rank: 4000}"], "rank 4000 is above the"),
        (["methods.lora={ranks: {'*no_such*': 2}}"], "matches none of the chosen layers"),
        (["methods.selective={sites: cross}", "methods.lora={sites: cross}"], "both claim"),
        (["methods.new_token={tokens: ['fox']}", "data.token=fox"], "exists already"),
        (["objective.path=vp", "backbone=tiny_dit"], "objective.path=vp"),
        (["optim.name=muon", "methods.lora=null"], "no such matrix is trained"),
        (["optim.name=paged_adamw8bit", "run.device=cpu"], "is cpu; set optim.name=adamw8bit"),
        (["run.batch_size=1"], "too small for 2 groups of data"),
    ],
    ids=[
        "clash",
        "sites",
        "layers",
        "rank",
        "ranks",
        "select",
        "token",
        "path",
        "muon",
        "paged",
        "batch",
    ],
)
def test_what_fit_would_refuse_is_refused(words: list[str], message: str, capsys: Any) -> None:
    code, text = check(["recipe=lora", *words], capsys)
    assert (code, message in text) == (BAD_RECIPE, True), text


def test_fp8_where_fit_would_refuse_it_is_refused(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8 = "run.base_precision.denoiser=fp8"
    lora = ["recipe=lora", "run.precision=fp32", fp8]
    assert check(lora, capsys)[0] == 0
    code, text = check(["recipe=full", fp8], capsys)
    assert code == BAD_RECIPE and "denoiser=fp8 is for layers that do not train, and" in text
    monkeypatch.setattr("trainer.backbones.device._device", lambda name, rank: torch.device("mps"))
    code, text = check(lora, capsys)
    assert code == BAD_RECIPE and "Apple's GPUs have no fp8; give bf16" in text


@pytest.mark.parametrize("plan", [[], ["plan=true"]], ids=["check", "plan"])
def test_a_start_that_a_method_cannot_make_is_refused(plan: list[str], capsys: Any) -> None:
    words = ["recipe=coda_prompt", "methods.coda_prompt.pool=129", "continual.images=0", *plan]
    code, said = check(words, capsys)
    assert "no more than 128 parts can be orthogonal" in said, said
    assert code == BAD_RECIPE


def test_an_adapter_that_does_not_fit_is_refused(
    tiny_folder: Path, save_trained_on: Callable[..., Path], capsys: Any
) -> None:
    path = save_trained_on(tiny_folder, {"lora": {"sites": "cross", "rank": 2}})
    words = ["recipe=lora", f"backbone={tiny_folder}", WORD, f"run.start_from={path}"]
    code, text = check([*words, "methods.new_token=null", "methods.lora.rank=4"], capsys)
    assert code == BAD_RECIPE and "in the file and" in text
    fine = ["methods={lora: {sites: cross, rank: 2}, new_token: null}", "data.token=sks"]
    assert check([*words, *fine], capsys)[0] == 0


def test_no_weight_is_read(
    tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("diffusers.models.modeling_utils.ModelMixin.from_pretrained", refuse)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    words = ["recipe=lora", f"backbone={tiny_folder}", WORD, "methods.lora.rank=2"]
    assert check(words, capsys)[0] == 0


@pytest.mark.parametrize(
    "method",
    [
        "lora={init: pissa}", "dora={sites: all}", "full={}",
        "selective={detach_first_token: true}", "peft_adapter={type: loha}",
        "peft_adapter={type: oft}", "agent_attention={}", "nf4={min_size: 1024}",
    ],
)  # fmt: skip
def test_what_fits_is_not_refused(method: str, tiny_folder: Path, capsys: Any) -> None:
    words = ["recipe=lora", f"backbone={tiny_folder}", WORD, f"methods.{method}"]
    if "lora=" not in method and "nf4" not in method:
        words.append("methods.lora=null")
    code, text = check(words, capsys)
    assert code == 0 and "plan=true" not in text, text
