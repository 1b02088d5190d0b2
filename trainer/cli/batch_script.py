"""The text of a Slurm batch script. Its last part is that of `slurm/fit.sbatch`, which is the same
script for a reader; `tests/cli/test_slurm_verb.py` compares them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BODY = r"""
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from the job
export OMP_NUM_THREADS="$SRUN_CPUS_PER_TASK"

code=0
srun python -m trainer fit "$@" \
  run.devices="$SLURM_NTASKS_PER_NODE" run.nodes="$SLURM_NNODES" || code=$?

# 75: the time is nearly up, the run is saved. A requeued job keeps its id, and so its run folder
if [[ $code == 75 && ${SLURM_RESTART_COUNT:-0} -lt ${MAX_REQUEUES:-20} ]]; then
  job=$SLURM_JOB_ID
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then # the id alone may mean the whole array
    job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
  fi
  scontrol requeue "$job" ||
    echo "not requeued: submit the same words again with run=<run folder>" >&2
fi
exit "$code"
"""
RUN_ID = """
export TRAINER_RUN_ID="$SLURM_JOB_ID"                  # every rank writes to runs/<recipe>/<job id>
"""


@dataclass(frozen=True)
class Container:
    """An image that the program runs in on every node. A file that ends in .sif is started by
    Apptainer, any other image by Slurm's plugin pyxis. mounts: `host:inside` pairs."""

    image: str
    mounts: tuple[str, ...] = ()
    gpus: bool = True

    def words(self) -> list[str]:
        """What stands between `srun` and `python`."""
        mounts = ",".join(self.mounts)
        if self.image.endswith(".sif"):
            bind = ["--bind", mounts] if mounts else []
            return ["apptainer", "exec", *(["--nv"] if self.gpus else []), *bind, self.image]
        given = [f"--container-mounts={mounts}"] if mounts else []
        return [f"--container-image={self.image}", *given]


@dataclass(frozen=True)
class BatchScript:
    """options: of sbatch, `None` for one without a value; words: of `fit`; cases: of an array, the
    further words of each task; setup: a line of bash before the program starts."""

    options: Mapping[str, str | None]
    words: Sequence[str]
    command: str
    cases: Sequence[Sequence[str]] = ()
    setup: str | None = None
    container: Container | None = field(default=None)

    def text(self) -> str:
        """The whole file."""
        head = [
            "#!/usr/bin/env bash",
            # a value may have several lines, and none of them is for bash or sbatch to read
            *(f"# {line}" for line in f"Made by: {self.command}".splitlines()),
            "#",
            *(
                f"#SBATCH --{name}" + ("" if value is None else f"={value}")
                for name, value in self.options.items()
            ),
        ]
        # before `set -u`, which scripts that activate an environment do not bear
        setup = [f"{self.setup} || exit 1"] if self.setup else []
        start = "\n".join([*head, *setup, "set -euo pipefail", "", *self._words()])
        body = BODY if self.cases else RUN_ID + BODY.removeprefix("\n")
        return f"{start}\n{self._started(body)}"

    def _words(self) -> list[str]:
        lines = [f"set -- {shlex.join(self.words)}"]
        if self.cases:
            lines.append('case "$SLURM_ARRAY_TASK_ID" in')
            lines += [
                f'  {number}) set -- "$@" {shlex.join(own)} ;;'
                for number, own in enumerate(self.cases)
            ]
            lines.append("esac")
        return lines

    def _started(self, body: str) -> str:
        if self.container is None:
            return body
        words = shlex.join(self.container.words())
        return body.replace("\nsrun python ", f"\nsrun {words} python ")
