"""`slurm`: checks a recipe and prints or submits a Slurm job that trains it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from trainer.cli.batch_script import BatchScript, Container
from trainer.cli.check import check_run_folder, check_together
from trainer.cli.options import Count, RecipeOptions, split_options
from trainer.common.exit_codes import LeaveError
from trainer.common.program import program
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe, RecipeError
from trainer.config.sweep_cases import Case, cases_of, sweep_folder

EARLY = 60  # seconds by which Slurm may send its signal too early
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def _like(pattern: str, what: str) -> BeforeValidator:
    """Takes a value whose text has a form; what: how the form is described."""

    def checked(value: Any) -> str:
        text = str(value)
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not {what}")
        return text

    return BeforeValidator(checked)


# each stands on a line of the script that Slurm reads by itself
Word = Annotated[
    str, _like(r"[A-Za-z0-9][\w.,:=@/+&|*()-]*", "one word of Slurm's, without spaces and quotes")
]
JobName = Annotated[str, _like(r"[A-Za-z0-9][\w.-]*", "a name of letters, digits, . _ and -")]
Memory = Annotated[str, _like(r"\d+[KMGT]?", "an amount of memory, as in 64G")]
# options that are texts to Slurm; to YAML 12:00:00 is a number of seconds, and 0042 is 34
TEXTS = ("time", "partition", "account", "qos", "constraint", "mem", "gres", "name")
# what Lightning takes for a shell on a node, and then starts ranks of its own
SHELLS = ("bash", "interactive")


class SlurmOptions(RecipeOptions):
    """Prints a batch script for a Slurm cluster that trains a recipe, saves it before the time
    limit, and requeues it until it is finished. Every key of the recipe can be given as well, as in
    optim.lr=1e-4."""

    nodes: Count | None = Field(None, description="machines that train together; null is run.nodes")
    devices: Count | None = Field(
        None, description="devices on each node, one task each; null is run.devices"
    )
    cpus: Count = Field(8, description="processor cores for each device")
    time: Word = Field(
        "04:00:00",
        description="limit of one start of the job, as [days-]hours:minutes:seconds, or minutes",
    )
    partition: Word | None = Field(None, description="partition of the cluster")
    account: Word | None = Field(None, description="account that is charged")
    qos: Word | None = Field(None, description="quality of service")
    constraint: Word | None = Field(None, description="feature that the nodes need, as in a100")
    mem: Memory | None = Field(None, description="main memory of each node, as in 64G")
    gres: Word | None = Field(
        None,
        description="generic resources of each node in place of --gpus-per-node, as gpu:a100:4",
    )
    name: JobName | None = Field(None, description="name of the job; null is that of the recipe")
    signal: Count = Field(
        180, description="seconds before the time limit at which the run is saved and requeued"
    )
    setup: str | None = Field(
        None,
        description="line of bash that runs first, as in 'source .venv/bin/activate'; null starts "
        "with the environment of the submission",
    )
    container: str | None = Field(
        None,
        description="image that the program runs in: a .sif file by Apptainer, any other by the "
        "plugin pyxis of Slurm",
    )
    mounts: list[str] = Field(
        default_factory=list, description="folders for the container, as in [/data:/data]"
    )
    array: bool = Field(
        False,
        description="a job array that trains a sweep: each key with several values in brackets, as "
        "in optim.lr=[1e-4,3e-4], is trained with each of them",
    )
    at_once: Count | None = Field(
        None, description="tasks of an array that may run at the same time; null sets no limit"
    )
    sweep: Path | None = Field(
        None, description="folder of a sweep's runs; null is <run.out>/sweep-<recipe>-<its words>"
    )
    run: Path | None = Field(None, description="run folder, as of `fit`: a run in it resumes")
    out: Path | None = Field(None, description="file to write the script to; null prints it")
    submit: bool = Field(False, description="submit the job with sbatch")

    @field_validator("time")
    @classmethod
    def _readable(cls, value: str) -> str:
        seconds_of(value)
        return value

    @field_validator("name")
    @classmethod
    def _no_shell(cls, value: str | None) -> str | None:
        if value in SHELLS:
            raise ValueError(f"{value} is what Slurm calls a shell on a node; give another name")
        return value

    @field_validator("setup")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        if value is not None and len(value.splitlines()) > 1:
            raise ValueError("setup is more than one line; join commands by && or call a script")
        return value

    @field_validator("mounts")
    @classmethod
    def _pairs(cls, value: list[str]) -> list[str]:
        if wrong := [each for each in value if ":" not in each or "," in each]:
            raise ValueError(f"{wrong[0]} is not <folder>:<folder in the container>")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> SlurmOptions:
        if seconds_of(self.time) < self.signal + EARLY:
            raise ValueError(
                f"time={self.time} leaves no time to train: the run is saved signal={self.signal} "
                f"seconds before it, and Slurm may be {EARLY} seconds early; give a longer time or "
                "a shorter signal"
            )
        if self.mounts and self.container is None:
            raise ValueError("mounts are of a container; give container=<image> too")
        if not self.array and (given := self.model_fields_set & {"at_once", "sweep"}):
            raise ValueError(f"{sorted(given)[0]}= is for a sweep; give array=true too")
        if self.array and self.run is not None:
            raise ValueError("run= names one run folder, and a sweep has several; give sweep=")
        return self


def seconds_of(time: str) -> int:
    """A time limit of Slurm in seconds: minutes, minutes:seconds, hours:minutes:seconds, or
    days-hours with or without minutes and seconds.

    Raises:
        ValueError: it is none of these, or not above 0.
    """
    match = TIME.fullmatch(time)
    days, *rest = match.groups() if match else (None,)
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = {0: (0, 0, 0), 1: (0, *parts, 0), 2: (0, *parts), 3: parts}[
            len(parts)
        ]
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    if match is None or total == 0:
        raise ValueError(
            "no time above 0; give hours as in 04:00:00, days as in 2-00:00:00, or minutes as in 90"
        )
    return total


def run(words: list[str]) -> int:
    options, rest = split_options([_as_text(word) for word in words], SlurmOptions)
    counts = _counts(options, rest)
    cases = cases_of([*rest, *counts]) if options.array else []
    recipes = [case.recipe for case in cases] or [load_recipe([*rest, *counts])]
    out = None if options.out is None else options.out.expanduser()
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise RecipeError(f"out={out} is no file in a folder that exists; give another")
    for line in _checked(recipes):
        print(line, file=sys.stderr)  # the script goes to stdout
    fixed = _without_counts(rest)
    made_by = shlex.join([*program().split(), "slurm", *words])
    text = script_of(options, fixed, recipe=recipes[0], cases=cases, made_by=made_by).text()
    if out is not None:
        _write(out, text)
    elif not options.submit:
        print(text, end="")
    if options.submit:
        _submit(text, out)
    return 0


def script_of(
    options: SlurmOptions,
    words: list[str],
    *,
    recipe: Recipe,
    cases: list[Case],
    made_by: str,
) -> BatchScript:
    """The batch script of a recipe, or of the cases of a sweep. made_by: the command."""
    gpus, image = recipe.run.device != "cpu", options.container
    fixed, own = words, []
    if cases:
        folder = options.sweep or sweep_folder(cases)
        own = [[*case.words, f"run={folder / case.name}"] for case in cases]
        fixed = [word for word in words if word.partition("=")[0] not in cases[0].values]
    elif options.run is not None:
        fixed = [*words, f"run={options.run}"]
    return BatchScript(
        _sbatch_options(options, recipe, len(cases)),
        fixed,
        command=made_by,
        cases=own,
        setup=options.setup,
        container=Container(image, tuple(options.mounts), gpus) if image else None,
    )


def _sbatch_options(options: SlurmOptions, recipe: Recipe, tasks: int) -> dict[str, str | None]:
    """What stands on the `#SBATCH` lines. tasks: of the array, 0 for a job that is none."""
    run, stem = recipe.run, re.sub(r"[^\w.-]", "-", Path(recipe.name).stem)
    gpus = run.device != "cpu" and options.gres is None
    given = {
        "job-name": options.name or (f"fit-{stem}" if stem in SHELLS else stem),
        "nodes": str(run.nodes),
        "gpus-per-node": str(run.devices) if gpus else None,
        "gres": options.gres,
        "ntasks-per-node": str(run.devices),
        "cpus-per-task": str(options.cpus),
        "mem": options.mem,
        "time": options.time,
        **{key: getattr(options, key) for key in ("partition", "account", "qos", "constraint")},
        "signal": f"USR1@{options.signal}",  # without B: the tasks get it, not the shell alone
        "array": _array(tasks, options.at_once) if tasks else None,
        "output": "slurm-%x-%A_%a.log" if tasks else "slurm-%x-%j.log",
        "open-mode": "append",
    }
    return {name: value for name, value in given.items() if value is not None} | {"requeue": None}


def _array(count: int, at_once: int | None) -> str:
    return f"0-{count - 1}" + (f"%{at_once}" if at_once else "")


def _checked(recipes: list[Recipe]) -> list[str]:
    """As `check`, but for what this machine has: the job runs on others. Returns what is to be
    said."""
    for recipe in recipes:
        device = recipe.run.device
        if device == "mps" or ":" in device:
            raise RecipeError(
                f"run.device={device} is one GPU of one machine; give run.device=cuda, auto or cpu"
            )
        check_run_folder(recipe)
    return check_together(recipes)


def _as_text(word: str) -> str:
    """The word with its value quoted, where that is one of `TEXTS`."""
    key, _, text = word.partition("=")
    if key not in TEXTS or text in ("", "null") or text[0] in "'\"":
        return word
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


def _counts(options: SlurmOptions, rest: list[str]) -> list[str]:
    """`nodes` and `devices` as the keys of the recipe that they are."""
    given = {"run.nodes": options.nodes, "run.devices": options.devices}
    named = {word.partition("=")[0] for word in rest}
    for key, value in given.items():
        if value is not None and key in named:
            raise RecipeError(f"{key.removeprefix('run.')} and {key} say the same; give one")
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def _without_counts(rest: list[str]) -> list[str]:
    """The words without those that the script takes from the job."""
    return [word for word in rest if word.partition("=")[0] not in ("run.nodes", "run.devices")]


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise RecipeError(f"out={path} exists, and is not written over; give another name")
    path.write_text(text, encoding="utf-8")
    print(path)


def _submit(text: str, path: Path | None) -> None:
    """Submits the script, and prints what sbatch says."""
    if shutil.which("sbatch") is None:
        raise RecipeError(
            "submit=true: there is no sbatch on this machine; give it on a login node of the "
            "cluster, or leave it out and submit the printed script there"
        )
    words = ["sbatch", *([str(path)] if path else [])]
    ended = subprocess.run(words, input=None if path else text, capture_output=True, text=True)
    if ended.returncode:
        raise LeaveError(1, f"error: sbatch refused the job: {ended.stderr.strip()}")
    print(ended.stdout.strip())
