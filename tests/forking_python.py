"""A `python` for programs that start `python -m trainer`, as Slurm and `sweep` do: the trainer is
forked where all is imported (`commands.py`), which spares each start the seconds of its imports.

    with forking_python(folder) as python:
        subprocess.run([python.path, "-m", "trainer", "list"])

The program that is started passes on the signals it gets, ends with the code of the fork, and takes
the fork along when it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import become, server

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

own = socket.socket(socket.AF_UNIX)
own.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCONT):
    signal.signal(number, lambda number, _: own.send(bytes([number])))
facts = dict(words=sys.argv[1:], cwd=os.getcwd(), env=dict(os.environ), pid=os.getpid())
text = json.dumps(facts).encode()
socket.send_fds(own, [len(text).to_bytes(8, "big")], [1, 2])
own.sendall(text)
code = own.recv(1)
os._exit(code[0] if code else 1)
"""


@dataclass(frozen=True)
class Python:
    """path: what to start; pids: a folder with the number of each fork, by that of its client."""

    path: Path
    pids: Path

    def fork_of(self, client: int) -> int | None:
        """The process that trains, of the one that was started; None for any other program."""
        path = self.pids / str(client)
        return int(path.read_text()) if path.is_file() else None


@contextlib.contextmanager
def forking_python(folder: Path) -> Iterator[Python]:
    """The program, in a folder of its own, until the block ends."""
    made = Python(folder / "bin" / "python", folder / "pids")
    for each in (made.path.parent, made.pids):
        each.mkdir(parents=True)
    address = str(folder / "socket")
    made.path.write_text(CLIENT.format(python=sys.executable, address=address))
    made.path.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    process = server().Process(target=_serve, args=(listener, made.pids))
    process.start()
    listener.close()
    try:
        yield made
    finally:
        process.kill()
        process.join()


def _serve(listener: socket.socket, pids: Path) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those end that look after one
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            with contextlib.suppress(BaseException):
                _look_after(connection, pids)
            os._exit(0)
        connection.close()


def _look_after(connection: socket.socket, pids: Path) -> None:
    """Starts one fork, tells it the signals that its client gets, and the client how it ended."""
    head, files, _, _ = socket.recv_fds(connection, 8, 2)
    text = b""
    while len(text) < int.from_bytes(head, "big"):
        text += connection.recv(1 << 20)
    asked = json.loads(text)
    ends, inside = os.pipe()
    fork = os.fork()
    if fork == 0:
        os.close(ends)
        _train(asked, files)
    os.close(inside)
    for file in files:
        os.close(file)
    (pids / str(asked["pid"])).write_text(str(fork))
    while ends not in (ready := select.select([connection, ends], [], [])[0]):
        numbers = connection.recv(64) if ready else b""
        for number in numbers or [signal.SIGKILL]:
            os.kill(fork, number)
        if not numbers:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(bytes([code if code >= 0 else 128 - code]))


def _train(asked: dict[str, Any], files: list[int]) -> None:
    """What the fork does; never returns."""
    code = 1
    try:
        assert asked["words"][:2] == ["-m", "trainer"]
        for number, file in enumerate(files, start=1):
            os.dup2(file, number)
        code = become(asked["words"][2:], asked["cwd"], asked["env"])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
