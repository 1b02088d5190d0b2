"""The plan a user reads before training."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.methods.apply import apply_methods
from trainer.training import plan_report
from trainer.training.memory_estimate import memory_of
from trainer.training.plan_report import describe_plan, show_plan, size
from trainer.training.step_memory import step_bytes


@pytest.fixture
def recipe(tiny_folder: Path) -> Recipe:
    words = [
        "recipe=custom_diffusion",
        f"backbone={tiny_folder}",
        "methods.new_token.init=animal",
        "run.batch_size=2",
        "data.class_word=animal",
    ]
    return load_recipe(words)


def test_it_counts_what_the_denoiser_keeps_for_its_backward(recipe: Recipe, tiny: Any) -> None:
    apply_methods(tiny, recipe.methods)
    kept: dict[int, int] = {}
    alive = []

    def count(value: torch.Tensor) -> torch.Tensor:
        alive.append(value)
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    own = {p.untyped_storage().data_ptr() for p in tiny.denoiser.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        tiny.denoiser(
            torch.randn(2, 8, 8, 8),
            torch.zeros(2),
            encoder_hidden_states=torch.randn(2, tiny.tokenizer.model_max_length, 128),
        )
    real = sum(size for storage, size in kept.items() if storage not in own)
    assert step_bytes(recipe, tiny, 2) == pytest.approx(real, rel=0.1)


def test_the_table_names_methods_sites_and_counts(recipe: Recipe, tiny: Any) -> None:
    plan = apply_methods(tiny, recipe.methods)
    facts = describe_plan(recipe, tiny, plan, memory_of(recipe, tiny, plan).peak)
    text = StringIO()
    show_plan(facts, recipe.methods, Console(file=text, width=120))
    shown = text.getvalue()
    cross = [site for site in tiny.sites if site.kind == "cross"]
    assert "selective" in shown
    assert "[k, v]" in shown
    assert f"{facts['methods']['selective']['parameters']:,}" in shown
    assert len(facts["methods"]["selective"]["sites"]) == len(cross)
    assert facts["trained"] == sum(p.numel() for p in tiny.parameters() if p.requires_grad)
    assert facts["adapter_bytes"] == 4 * facts["trained"]
    assert facts["peak_memory_bytes"] > sum(4 * p.numel() for p in tiny.parameters())


@pytest.mark.parametrize(
    ("count", "text"), [(900, "0.9 kB"), (720_000, "0.7 MB"), (3_440_000_000, "3.4 GB")]
)
def test_sizes(count: int, text: str) -> None:
    assert plan_report.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 kB"), (99_900, "99.9 kB"), (100_000, "0.1 MB"), (140_000, "0.1 MB"),
     (999_000_000, "999.0 MB"), (1_000_000_000, "1.0 GB")],
)  # fmt: skip
def test_bytes_in_readable_units(count: int, text: str) -> None:
    assert size(count) == text
