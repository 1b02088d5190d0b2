"""How long a run is: in optimiser steps, or in epochs, passes over the training data, which become
steps when the recipe is read."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from trainer.config.optimisers import for_another
from trainer.config.run_section import RunSpec
from trainer.config.schema import RecipeError
from trainer.config.tree import merge_trees
from trainer.data.source import Source

LENGTHS = ("steps", "epochs")


def laid_over(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`. A length of the run in `high` replaces both lengths of `low`. Where `high`
    names another optimiser, options of `low` that are not for it are left out."""
    low = for_another(low, high)
    above, below = high.get("run"), low.get("run")
    if isinstance(above, Mapping) and isinstance(below, Mapping) and _given(above):
        low = {**low, "run": {key: below[key] for key in below if key not in LENGTHS}}
    return merge_trees(low, high)


def in_steps(tree: Mapping[str, Any], run: RunSpec, data: Source) -> tuple[dict[str, Any], RunSpec]:
    """A recipe's tree and its section `run`, with the steps that its epochs take. In the tree the
    steps stand in the place of the epochs, so that a run, its adapter and a resume of it do not
    depend on counting again.

    Raises:
        RecipeError: how long an epoch is cannot be known here.
    """
    if run.epochs is None:
        return dict(tree), run
    if (tree.get("continual") or {}).get("concepts"):
        raise RecipeError("run.epochs: concepts learned in a row have no epochs; give run.steps")
    steps = steps_of(run, data)
    own = {key: value for key, value in tree["run"].items() if key != "epochs"}
    return {**tree, "run": {**own, "steps": steps}}, run.model_copy(update={"steps": steps})


def steps_of(run: RunSpec, data: Source) -> int:
    """The optimiser steps of `run.epochs`; the last epoch is filled up to a whole step."""
    assert run.epochs is not None, "a run of steps"
    try:
        samples = data.epoch()
    except ValueError as error:  # shards that cannot be counted, or a server without an answer
        raise RecipeError(f"run.epochs={run.epochs:g}: {error}") from error
    if samples is None:
        source = type(data).__module__.rpartition(".")[2]
        raise RecipeError(
            f"run.epochs={run.epochs:g}: data.source={source} does not know how many samples it "
            "has before it is opened; give run.steps"
        )
    return max(1, ceil(run.epochs * samples / (run.batch_size * run.accumulate) - 1e-9))


def told_length(run: RunSpec, data: Source) -> list[str]:
    """A sentence for a length in epochs; none for one in steps."""
    if run.epochs is None:
        return []
    at_once = run.batch_size * run.accumulate
    return [
        f"run.epochs={run.epochs:g}: an epoch has {data.epoch():g} samples, a step {at_once}, so "
        f"run.steps={run.steps}"
    ]


def _given(run: Mapping[str, Any]) -> bool:
    return any(run.get(key) is not None for key in LENGTHS)
