"""`sweep`: trains a recipe with each choice of several values, and says which run is best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from trainer.cli.check import check_run_folder, check_together
from trainer.cli.options import Count, RecipeOptions, split_options
from trainer.cli.sweep_processes import Process, gpus_here, train_each
from trainer.cli.sweep_table import Column, RunRow, row_of, show_table, table_facts
from trainer.common.exit_codes import CODES, LeaveError
from trainer.config.schema import Recipe, RecipeError
from trainer.config.sweep_cases import Case, cases_of, sweep_folder
from trainer.runs.run_folder import is_finished, made, write_text

LOSSES = ("train/loss", "val/loss")


class SweepOptions(RecipeOptions):
    """Trains a recipe with every combination of the values that keys have in brackets, as in
    optim.lr=[1e-4,3e-4] methods.lora.rank=[4,16], and prints which run is best. The same command
    given again goes on with what is not finished. `slurm array=true` with the same words trains
    them on a cluster."""

    at_once: Count = Field(
        1, description="runs at the same time, which take turns on the machine's GPUs"
    )
    sweep: Path | None = Field(
        None,
        description="folder of the runs; null is <run.out>/sweep-<recipe>-<its words>",
    )
    metric: str | None = Field(
        None,
        description="a further number of metrics.jsonl to compare the runs by, beside their "
        "losses, as in val/loss_q7",
    )
    better: Literal["lower", "higher"] = Field("lower", description="which `metric` is the better")
    table: bool = Field(False, description="print the table of what is there, and train nothing")


def run(words: list[str]) -> int:
    options, rest = split_options(words, SweepOptions)
    cases = cases_of(rest)
    folder = (options.sweep or sweep_folder(cases)).expanduser()
    columns = _columns(options)
    swept = set(cases[0].values)
    fixed = [word for word in rest if word.partition("=")[0] not in swept]
    codes: dict[str, int] = {}
    if not options.table:
        _check(cases, folder)
        print(f"{len(cases)} runs in {made(folder)}", flush=True)
        gpus = gpus_here() if options.at_once > 1 else ()
        codes = train_each(_processes(cases, folder, fixed), options.at_once, gpus)
    rows = [_row(case, folder, columns, code=codes.get(case.name)) for case in cases]
    show_table(rows, columns)
    if folder.is_dir():
        facts = {"words": rest, **table_facts(rows, columns)}
        write_text(folder / "sweep.json", json.dumps(facts, indent=1))
    print(folder)
    return _code(rows, codes)


def _row(case: Case, folder: Path, columns: Sequence[Column], *, code: int | None) -> RunRow:
    return row_of(case.name, case.values, folder / case.name, columns=columns, code=code)


def _columns(options: SweepOptions) -> list[Column]:
    own = [options.metric] if options.metric and options.metric not in LOSSES else []
    return [*(Column(name, "lower") for name in LOSSES), *(Column(n, options.better) for n in own)]


def _check(cases: Sequence[Case], folder: Path) -> None:
    """Checks every run of a sweep before the first one starts; data that several share, once."""
    for case in cases:
        recipe = case.recipe
        if recipe.continual.concepts:
            raise RecipeError(
                f"{recipe.name} learns concepts in a run each, which a sweep does not compare; "
                "start such runs with `python -m trainer fit`"
            )
        check_run_folder(recipe)
        _refuse_another(folder / case.name, recipe)
    for line in check_together([case.recipe for case in cases]):
        print(line)


def _refuse_another(own: Path, recipe: Recipe) -> None:
    """Raises RecipeError where the folder of a run has the finished one of another recipe."""
    try:
        is_finished(own, recipe)
    except ValueError as error:
        what = str(error).partition("; choose another run.id")[0]
        raise RecipeError(f"{what}; give another folder for this sweep by sweep=") from error


def _processes(cases: Sequence[Case], folder: Path, fixed: Sequence[str]) -> list[Process]:
    """What is not finished, as `fit` has it."""
    found = []
    for case in cases:
        own = folder / case.name
        if is_finished(own, case.recipe):
            print(f"{case.name}: finished before")
            continue
        words = ("fit", *fixed, *case.words, f"run={own}")
        found.append(
            Process(case.name, words, log=folder / f"{case.name}.log", one_gpu=_takes_gpu(case))
        )
    return found


def _takes_gpu(case: Case) -> bool:
    """Whether it may be given any one GPU of the machine."""
    run = case.recipe.run
    return run.device in ("auto", "cuda") and run.devices * run.nodes == 1


def _code(rows: Sequence[RunRow], codes: dict[str, int]) -> int:
    """0 where every run is finished.

    Raises:
        LeaveError: with the code of a signal that ended them, or else of the first run that failed.
    """
    signalled = next((code for code in codes.values() if code in CODES.values()), 0)
    failed = [row.name for row in rows if codes.get(row.name, 0)]
    if signalled:
        raise LeaveError(signalled, "the sweep was stopped; the same command goes on with it")
    if failed:
        raise LeaveError(
            codes[failed[0]],
            f"error: {len(failed)} of {len(rows)} runs failed, the first of them {failed[0]}; "
            f"{failed[0]}.log beside its folder says why, and the same command tries it again",
        )
    return 0
