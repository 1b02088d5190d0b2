"""A process that trains when it is told to, for bench/threads.py:

    python bench/_stepping.py command|plain

Reads seconds, a line each, trains that long on the tiny backbone, and prints a line of JSON for
each: images, seconds. command: threads as `python -m trainer` has them; plain: as an ordinary
script has them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext

from trainer.common.spinning import watched
from trainer.common.threads import limit_threads

WORDS = (
    "recipe=lora", "data.prior_images=4", "data.prior_prompts=[a fox, a cat]", "data.prior_steps=2",
    "data.class_word=null",
)  # fmt: skip


def main(how: str) -> None:
    if how == "command":
        limit_threads()
    with watched() if how == "command" else nullcontext():
        from _steps import Step

        from trainer.cli.options import quiet_libraries

        quiet_libraries()
        step = Step(WORDS)
        step()
        images = len(step.batch.positions)
        print("ready", flush=True)
        for line in sys.stdin:
            begin, steps = time.perf_counter(), 0
            while time.perf_counter() - begin < float(line):
                step()
                steps += 1
            seconds = time.perf_counter() - begin
            print(json.dumps({"images": steps * images, "seconds": seconds}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
