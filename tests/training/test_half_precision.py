"""Training in fp16: the loss is scaled, its gradients are not, an overflow costs a step and no
weight, and a run that resumes has the scale it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.training.checkpoint_files import every_checkpoint, read_checkpoint, verified
from trainer.training.tasks.denoise import Denoise

WORDS = [
    "recipe=lora", "run.batch_size=2", "run.validate_every=0", "run.checkpoint_every=2",
    "run.checkpoint_keep=9", "preview.every=0", "data.prior_weight=0", "data.augment=false",
    "tracker=none", "run.device=cpu", "run.log_every=1", "optim.lr=1e-3", "optim.ema=null",
]  # fmt: skip


def fit(folder: Path, backbone: Path, *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["fit", *WORDS, f"backbone={backbone}", f"run={folder}", *words]) == code
    path = folder / "adapter.safetensors"
    return load_file(path) if path.is_file() else {}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The norm of the gradients at each clipping."""
    found: list[float] = []
    original = torch.nn.utils.clip_grads_with_norm_

    def clip(values: Any, most: float, norm: torch.Tensor) -> None:
        found.append(float(norm))
        original(values, most, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", clip)
    return found


def test_gradients_are_unscaled_and_weights_stay_in_fp32(
    tiny_folder: Path, tmp_path: Path, norms: list[float]
) -> None:
    exact = fit(tmp_path / "exact", tiny_folder, "run.precision=fp32", "run.steps=2")
    half = fit(tmp_path / "half", tiny_folder, "run.precision=fp16", "run.steps=2")
    assert norms[2:] == pytest.approx(norms[:2], rel=0.05)
    assert {value.dtype for value in half.values()} == {torch.float32}
    for name, value in half.items():
        # AdamW moves by the sign at first, and a gradient near 0 has another sign in fp16
        assert (value - exact[name]).abs().mean() < 2e-4, name
    assert any(not torch.equal(value, exact[name]) for name, value in half.items())


NEW_SCALER = torch.amp.GradScaler.__init__


def first_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    def make(self: Any, device: str = "cuda") -> None:
        NEW_SCALER(self, device, init_scale=scale)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", make)


def test_an_overflow_costs_a_step_and_a_resumed_run_keeps_the_scale(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that begins too high is halved until gradients are finite, with `raise` too."""
    first_scale(monkeypatch, 2.0**26)
    words = ("run.precision=fp16", "run.steps=8")
    whole = fit(tmp_path / "whole", tiny_folder, *words)
    lost = events(tmp_path / "whole", "overflow")
    scales = [event["scale"] for event in lost]
    assert scales == [2.0 ** (26 - i) for i in range(len(scales))] and 2 < len(scales) < 8
    assert not events(tmp_path / "whole", "nonfinite")
    two, four = (
        verified(folder)
        for folder in reversed(every_checkpoint(tmp_path / "whole/checkpoints")[-2:])
    )
    assert {two.step, four.step} == {2, 4}
    states = {each.step: read_checkpoint(each) for each in (two, four)}
    assert states[2][1]["parts"]["scaler"]["scale"] == 2.0**24
    before, _ = states[2]
    assert all(not value.any() for name, value in before.items() if "lora_B" in name)  # not moved
    fit(tmp_path / "parts", tiny_folder, "run.precision=fp16", "run.steps=4")
    first_scale(monkeypatch, 1.0)  # of a new scaler: the checkpoint's stands
    again = fit(tmp_path / "parts", tiny_folder, *words)
    assert all(torch.equal(value, whole[name]) for name, value in again.items())
    assert [event["scale"] for event in events(tmp_path / "parts", "overflow")] == scales


def test_samples_that_are_at_fault_still_end_the_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite gradients without a scale to blame, and a loss that is not a number."""
    from trainer.training.module import DiffusionModule

    original = DiffusionModule.training_step
    for number, factor in enumerate((float("nan"), 1.0)):
        first_scale(monkeypatch, 2.0**10 if number == 0 else 1.0)

        def step(self: Any, batch: Any, index: int, factor: float = factor) -> Any:
            loss = original(self, batch, index)
            if factor == 1:
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss * factor

        monkeypatch.setattr(DiffusionModule, "training_step", step)
        folder = tmp_path / str(number)
        fit(folder, tiny_folder, "run.precision=fp16", "run.steps=2", code=70)
        (event,) = events(folder, "nonfinite")
        assert event["step"] == 0 and not events(folder, "overflow")


def test_a_run_keeps_its_precision(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    fit(tmp_path / "run", tiny_folder, "run.precision=fp16", "run.steps=2")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    fit(tmp_path / "run", tiny_folder, "run.precision=fp32", "run.steps=4", code=78)
    assert "begun with run.precision=fp16 (now fp32)" in capsys.readouterr().err


@pytest.mark.sampled(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_latents_are_fp32_and_the_same_with_the_cache_and_without(
    precision: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training step encodes under autocast, which would round latents, noise and x_t."""
    seen: list[Any] = []
    original = Denoise.encode

    def encode(self: Any, *arguments: Any) -> Any:
        seen.append(original(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Denoise, "encode", encode)
    words = (f"run.precision={precision}", "run.steps=2")
    cached = fit(tmp_path / "cached", tiny_folder, *words)
    fresh = fit(tmp_path / "fresh", tiny_folder, *words, "run.cache_latents=false")
    assert len(seen) == 4
    for one, other in zip(seen[:2], seen[2:], strict=True):
        assert one.batch.moments is not None and other.batch.moments is None
        for name in ("x0", "noise", "x_t"):
            own, wanted = getattr(other, name), getattr(one, name)
            assert own.dtype == wanted.dtype == torch.float32, name
            assert torch.equal(own, wanted), name
    assert all(torch.equal(value, fresh[name]) for name, value in cached.items())
