"""`python -m trainer` in a process that is forked where everything is imported: the real program
with its arguments, folder, environment and exit code, without the seconds that the imports take.
Runs on several ranks start themselves anew by their command line, so they need a new process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest


@cache
def server() -> Any:
    """The context whose processes are forked from one that has imported `imported.py`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported"])
    own, before = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:  # an import that fails there is passed over
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (own, before))))
        forkserver.ensure_running()
    return context


def start(
    *words: str, printed: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Any:
    """`python -m trainer <words>`, begun; its `stdout` and `stderr` are files in `printed`."""
    environment = dict(os.environ if env is None else env)
    files = [printed / name for name in ("stdout", "stderr")]
    process = server().Process(
        target=_run, args=(words, str(cwd or Path.cwd()), environment, files)
    )
    process.start()
    return process


def command(
    *words: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """What `python -m trainer <words>` printed and the code it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(*words, printed=Path(folder), cwd=cwd, env=env)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(words), timeout)
        files = (Path(folder) / name for name in ("stdout", "stderr"))
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


def take_rank(environment: Mapping[str, str]) -> None:
    """Tells Lightning the rank, for which it has looked when it was imported."""
    rank = environment.get("RANK", environment.get("SLURM_PROCID"))
    if rank is not None:
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        rank_zero_only.rank = int(rank)


def _run(
    words: Sequence[str], cwd: str, environment: Mapping[str, str], printed: Sequence[Path]
) -> None:
    for number, path in enumerate(printed, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.exit(become(words, cwd, environment))


def become(words: Sequence[str], cwd: str, environment: Mapping[str, str]) -> int:
    """What the program does with these words, in this process; its exit code."""
    assert "imported" in sys.modules, "it takes seconds to import all in each process"
    from trainer.__main__ import main

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["trainer", *words]
    take_rank(environment)
    return main(list(words))
