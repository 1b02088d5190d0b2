"""`python -m trainer` on two ranks, or on two of each of several nodes, that a launcher like
torchrun has started: all are forked where everything is imported, which saves the imports of new
processes."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path

from commands import start

RANKS = 2  # of a node


def launched(env: Mapping[str, str] | None = None, nodes: int = 1) -> list[dict[str, str]]:
    """The environment that the launcher gives to each rank; env: that of the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {k: v for k, v in (env or os.environ).items() if k != "TRAINER_RUN_ID"}
    given |= {
        "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(nodes * RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        given
        | {
            "GROUP_RANK": str(node), "RANK": str(node * RANKS + rank), "LOCAL_RANK": str(rank),
        }
        for node in range(nodes)
        for rank in range(RANKS)
    ]  # fmt: skip


def on_two_ranks(
    *words: str,
    printed: Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    nodes: int = 1,
) -> subprocess.CompletedProcess[str]:
    """What the first rank printed, and the code of the one that failed, if one did. printed: a
    folder for what they print."""
    processes = []
    for rank, own in enumerate(launched(env, nodes)):
        (printed / str(rank)).mkdir(parents=True)
        processes.append(start(*words, printed=printed / str(rank), cwd=cwd, env=own))
    running = {process.sentinel: process for process in processes}
    while running and (ended := wait(running, 240)):
        if any(running.pop(sentinel).exitcode for sentinel in ended):
            break  # the other would wait for it
    for process in processes:
        process.kill()
        process.join()
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    said = [
        (printed / "0" / name).read_text(encoding="utf-8", errors="replace")
        for name in ("stdout", "stderr")
    ]
    return subprocess.CompletedProcess(list(words), code, *said)
