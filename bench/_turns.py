"""A training program that trains when it is told to, for bench/peers.py:

    python bench/_turns.py 3 script.py --its-own options    # another project's script, unmodified
    python bench/_turns.py 3 trainer fit recipe=lora        # this project's command

A step is a step of its optimiser, whoever calls it. After 3 of them it writes `ready` to the pipe
TURNS_TELL; then it reads numbers of steps from the pipe TURNS_ASK, a line each, and answers each
with a line of JSON: wall and processor seconds, the mean loss, the most memory it has had resident.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Turns:
    """Stops the program after `left` steps of its optimiser, until it is told to go on."""

    def __init__(self, warm: int) -> None:
        self.left, self.warm = warm, True
        self.ask = os.fdopen(int(os.environ["TURNS_ASK"]))
        self.tell = os.fdopen(int(os.environ["TURNS_TELL"]), "w")
        self.steps, self.losses = 0, list[float]()
        self.began, self.used = 0.0, 0.0

    def stepped(self, *_: Any) -> None:
        self.left -= 1
        if self.left:
            return
        self._say("ready" if self.warm else json.dumps(self._measured()))
        self.warm = False
        line = self.ask.readline()
        if not line:  # whoever asked has gone, and nothing needs to be saved
            os._exit(0)
        self.left = self.steps = int(line)
        self.losses.clear()
        self.began, self.used = time.perf_counter(), time.process_time()

    def _measured(self) -> dict[str, float]:
        wall, used = time.perf_counter() - self.began, time.process_time() - self.used
        return {
            "steps": self.steps,
            "wall": wall,
            "processor": used,
            "loss": sum(self.losses) / max(1, len(self.losses)),
            "peak_bytes": peak_bytes(),
        }

    def _say(self, line: str) -> None:
        self.tell.write(line + "\n")
        self.tell.flush()


def peak_bytes() -> int:
    """The most memory this program has had resident; `getrusage` would count what the program that
    started it had, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell VmHWM")


def note_losses(losses: list[float]) -> None:
    """Every loss that a program calls `backward` of."""
    inner: Any = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(float(self.detach()))
        inner(self, *args, **kwargs)

    torch.Tensor.backward = backward  # type: ignore[method-assign]


def without_operators() -> None:
    """torchvision's transforms beside a torch without its compiled operators, which the scripts do
    not use: it stops where it describes them to torch."""
    if not hasattr(torch.ops.torchvision, "nms"):
        name = "torchvision._meta_registrations"
        sys.modules[name] = ModuleType(name)


def main(words: list[str]) -> None:
    warm, program, *own = words
    turns = Turns(int(warm))
    register_optimizer_step_post_hook(turns.stepped)
    note_losses(turns.losses)
    if program == "trainer":
        from trainer.__main__ import main as command

        raise SystemExit(command(own))
    without_operators()
    sys.argv = [program, *own]
    sys.path.insert(0, os.path.dirname(program))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
