"""What Windows has not: the package is imported, and its locks, checkpoints and signals work, where
its own modules find no `fcntl`, no signal but those of Windows, no `fork`, and folders that cannot
be opened. The system itself is Linux all the same: what Windows does otherwise is not tried here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import builtins, os, signal, stat, sys, types

ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog", "posix"}
NO_SIGNALS = {
    "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGPIPE",
    "SIG_BLOCK", "SIG_UNBLOCK", "SIG_SETMASK", "alarm", "setitimer", "pthread_sigmask",
    "pthread_kill", "sigwait", "pause", "siginterrupt",
}
NOT_IN_OS = {
    "fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "setsid", "killpg", "uname",
    "sched_getaffinity", "sched_setaffinity", "sysconf", "statvfs", "getloadavg", "wait4", "nice",
    "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "posix_fallocate",
}


def without(module, names, **instead):
    made = types.ModuleType(module.__name__)
    vars(made).update({key: value for key, value in vars(module).items() if key not in names})
    vars(made).update(instead)
    return made


def opened(path, flags, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return os.open(path, flags, *rest, **named)


def flushed(descriptor):
    import fcntl
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    os.fsync(descriptor)


LIKE = {
    "os": without(os, NOT_IN_OS, name="nt", open=opened, fsync=flushed),
    "signal": without(signal, NO_SIGNALS),
}
real, asked = builtins.__import__, set()


def imported(name, globals=None, locals=None, fromlist=(), level=0):
    if str((globals or {}).get("__name__")).partition(".")[0] == "trainer" and level == 0:
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in LIKE:
            asked.add(name)
            return LIKE[name]
    return real(name, globals, locals, fromlist, level)


builtins.__import__ = imported
import importlib, pkgutil
from pathlib import Path

import trainer

names = [each.name for each in pkgutil.walk_packages(trainer.__path__, "trainer.")]
for name in names:
    importlib.import_module(name)
assert asked == {"os", "signal"}, asked
assert len(names) > 300

import torch
from trainer.common.exit_codes import CODES
from trainer.common.threads import allowed_processors, this_machine
from trainer.data.loader import _calm
from trainer.runs.run_folder import locked, write_text
from trainer.training.callbacks.signal_recorder import Signals
from trainer.training.checkpoint_files import newest_checkpoint, prune_checkpoints, write_checkpoint

assert [number.name for number in CODES] == ["SIGTERM", "SIGINT"]
assert this_machine().allowed == len(allowed_processors()) == os.cpu_count()
with Signals(False) as signals:
    signal.raise_signal(signal.SIGTERM)
assert signals.received == 143
folder = Path(sys.argv[1])
with locked(folder):
    try:
        with locked(folder):
            raise AssertionError("locked twice")
    except ValueError as error:
        assert f"process {os.getpid()} on " in str(error), error
with locked(folder):
    pass
for step in (1, 2, 2):
    facts = {"step": step, "micro_step": step}
    made = write_checkpoint(folder, {"x": torch.full((3,), step)}, {"y": 1}, facts)
prune_checkpoints(folder, 1, made.folder)
found = newest_checkpoint(folder, print, tidy=True)
assert found.step == 2 and [path.name for path in folder.glob("step-*")] == ["step-000002"]
write_text(folder / "text", "one")
write_text(folder / "text", "two")
assert (folder / "text").read_text() == "two"
_calm(0)
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
print("all of", len(names))
"""


def test_every_module_is_imported_and_files_are_kept(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    found = subprocess.run(
        words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.startswith("all of ")
