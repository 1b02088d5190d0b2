"""What commands print is theirs: libraries do not chat, and what they really warn of is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli.help_pages import command_records
from trainer.cli.options import CHATTER
from trainer.common.paths import PACKAGE

WORDS = [
    "recipe=lora", "run.steps=2", "run.batch_size=1", "run.validate_every=1", "preview.every=0",
    "data.prior_weight=0", "data.class_word=null", "data.augment=false", "run.id=one",
    "methods.new_token.init=animal",
]  # fmt: skip
NOISE = re.compile(r"site-packages|Warning|lightning|diffusers|it/s|\d+%\|", re.IGNORECASE)
LOUD = {name for name in os.environ if name.endswith("_VERBOSITY")}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in LOUD}


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


ALL = """
import sys
from trainer.__main__ import main
for words in {each!r}:
    assert main(words) == 0
    print("ended", file=sys.stderr)
"""


def test_no_library_chats(tiny_folder: Path, tmp_path: Path) -> None:
    """A run with validation, its export, whose README's call is a pipeline of diffusers', and a
    picture; all in one new process, since a library is imported once."""
    adapter = "runs/lora/one"
    each = (
        ["fit", f"backbone={tiny_folder}", *WORDS],
        ["export", f"run={adapter}", "format=diffusers", "out=out"],
        ["sample", f"adapter={adapter}", "prompt=a <v1>", "steps=2"],
    )
    ended = run("-c", ALL.format(each=each), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    said = ended.stderr.splitlines()
    assert said.count("ended") == len(each)
    assert [line for line in said if NOISE.search(line)] == []


WARN = """
import logging, warnings
from trainer.cli.options import quiet_libraries
quiet_libraries()
for text in {texts!r}:
    module = "lightning.pytorch.loops"
    warnings.warn_explicit(text, UserWarning, "loops.py", 1, module=module)
    warnings.warn_explicit(text, UserWarning, "mine.py", 1, module="mine")
log = logging.getLogger("lightning.fabric.utilities.distributed")
log.addHandler(logging.StreamHandler())
log.info("distributed talks")
log.warning("distributed warns")
"""
FAIL = """
import diffusers, transformers
diffusers.utils.logging.get_logger("diffusers.x").error("diffusers fails")
transformers.utils.logging.get_logger("transformers.x").error("transformers fails")
"""
REAL = "the loss is scaled twice"
HINT = "Found 526 module(s) in eval mode at the start of training."


def test_real_warnings_and_errors_are_shown() -> None:
    said = run("-c", WARN.format(texts=[REAL, HINT]) + FAIL).stderr
    assert said.count(REAL) == 2
    assert [line.partition(":")[0] for line in said.splitlines() if HINT in line] == ["mine.py"]
    assert "distributed talks" not in said
    assert "distributed warns" in said
    assert "diffusers fails" in said
    assert "transformers fails" in said


def test_who_asks_for_warnings_gets_them() -> None:
    assert run("-W", "default", "-c", WARN.format(texts=[HINT])).stderr.count(HINT) == 2


@pytest.mark.parametrize("message", CHATTER)
def test_each_is_one_message_and_not_any(message: str) -> None:
    assert not re.match(message, "")
    assert len(message) > 12


LIGHT = {  # they read files or start processes, and no library that chats
    "slurm": ["recipe=custom_diffusion"],
    "sweep": ["recipe=custom_diffusion", "run.seed=[1,2]", "table=true"],
    "report": ["runs=."],
}


def test_verbs_that_compute_nothing_import_no_torch(tmp_path: Path) -> None:
    every = [[name, *words] for name, words in LIGHT.items()]
    script = f"from trainer.__main__ import main\nimport sys\n[main(each) for each in {every!r}]\n"
    done = run("-c", script + "assert 'torch' not in sys.modules", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in command_records() if name not in LIGHT])
def test_every_verb_that_computes_is_quiet(name: str) -> None:
    verb = name.split()[0]
    path = PACKAGE / "cli" / f"{'import_' if verb == 'import' else verb}.py"
    assert "    quiet_libraries()\n" in path.read_text(encoding="utf-8")
