"""Which numbers stand together, and that a chart keeps what matters of many points."""

from __future__ import annotations

from trainer.runs.page.charts import LINES, POINTS, chart, charts_of, spread


def test_numbers_stand_with_their_like() -> None:
    names = (
        "own/number", "val/loss", "train/loss", "train/loss_smooth", "train/loss_t062",
        "val/loss_t062", "train/grad_norm", "train/update_ratio", "weight_norm/down.0", "lr/lora",
        "train/effective_lr", "train/clips_per_second", "time/data_ms", "time/forward_ms",
        "train/peak_memory_mib", "train/model_tflops", "train/mfu", "data/samples",
    )  # fmt: skip
    made = charts_of({name: {1: 0.5} for name in names})
    assert [(each.title, [line.name for line in each.lines]) for each in made] == [
        ("Loss", ["train/loss", "train/loss_smooth", "val/loss"]),
        ("Training loss by timestep", ["train/loss_t062"]),
        ("Held-out loss by timestep", ["val/loss_t062"]),
        ("Norm of the gradients", ["train/grad_norm"]),
        ("Update over weights", ["train/update_ratio"]),
        ("Norm of the trained weights by block", ["weight_norm/down.0"]),
        ("Learning rate", ["lr/lora", "train/effective_lr"]),
        ("Speed", ["train/clips_per_second"]),
        ("Time of a step", ["time/data_ms", "time/forward_ms"]),
        ("Memory", ["train/peak_memory_mib"]),
        ("Model FLOPs", ["train/model_tflops"]),
        ("Model FLOPs utilisation", ["train/mfu"]),
        ("Data", ["data/samples"]),
        ("own/number", ["own/number"]),
    ]


def test_curves_of_other_steps_have_gaps() -> None:
    made = chart("both", {"a": {1: 1.0, 2: None, 3: 3.0}, "b": {2: 5.0}, "c": {1: None}})
    assert made is not None and list(made.steps) == [1, 2, 3]
    assert {line.name: list(line.values) for line in made.lines} == {
        "a": [1.0, None, 3.0], "b": [None, 5.0, None]
    }  # fmt: skip
    assert made.lines[0].summary == (1.0, 3.0, 1.0, 3.0)
    assert made.described == "both over steps 1 to 3: a from 1 to 3, b from 5 to 5"
    assert chart("none", {"a": {1: None}}) is None


def test_a_long_curve_keeps_its_ends() -> None:
    made = chart("long", {"a": {step: float(step) for step in range(1, 10_001)}})
    assert made is not None and len(made.steps) == POINTS
    assert (made.steps[0], made.steps[-1]) == (1, 10_000)
    gaps = {b - a for a, b in zip(made.steps, made.steps[1:], strict=False)}
    assert gaps <= {20, 21}


def test_of_many_curves_some_are_shown() -> None:
    made = chart("many", {f"{i:02d}": {1: 1.0} for i in range(40)})
    assert made is not None and len(made.lines) == LINES
    assert made.note == f"{LINES} of 40 are shown"
    assert (made.lines[0].name, made.lines[-1].name) == ("00", "39")
    assert spread([1, 2, 3], 3) == [1, 2, 3] and spread(range(5), 2) == [0, 4]
