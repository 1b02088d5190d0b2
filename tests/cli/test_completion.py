"""Completion in the shells themselves: the printed script is sourced, and its function asked as the
shell asks it when TAB is pressed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.cli.data import COMMANDS
from trainer.cli.help_pages import command_records
from trainer.cli.usage import VERBS
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.section import keys_of
from trainer.config.lineage import backbone_names
from trainer.config.load import recipe_names
from trainer.config.run_section import RunSpec
from trainer.methods.feature.pnp import PnP
from trainer.methods.weight.lora import Lora

ASK_BASH = """
source {script}
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS={breaks}
read -ra COMP_WORDS <<<"$COMP_LINE"; COMP_CWORD=${{#COMP_WORDS[@]}}
function=$(complete -p "${{COMP_WORDS[0]}}" | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
"$function"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
# what the shell offers of its own is stood in for, and printed
ASK_ZSH = """
compdef() {{ : }}
compset() {{ : }}
_files() {{ print files }}
compadd() {{ while [[ $1 != -- ]]; do shift; done; shift; (( $# )) && print -l -- "$@"; : }}
source {script}
words=({words} {last}); CURRENT=$#words; PREFIX=$words[-1]
{function}
"""
PLACES = {
    "": list(VERBS),
    "f": ["fit"],
    "fit recipe=": [f"recipe={name}" for name in recipe_names()],
    "edit recipe=p": ["recipe=p2p", "recipe=pnp"],
    "edit method=masa": ["method=masactrl"],
    "edit methods.pnp.": [f"methods.pnp.{name}=" for name in PnP.model_fields],
    "edit bet": ["between="],
    "fit recipe=custom_d": ["recipe=custom_diffusion"],
    "check recipe=lora backbone=": [f"backbone={name}" for name in backbone_names()],
    "fit recipe=lora run.": [f"run.{name}=" for name in RunSpec.model_fields],
    "fit recipe=lora methods.lora.": [f"methods.lora.{name}=" for name in Lora.model_fields],
    "fit recipe=lora methods.lor": ["methods.lora=", "methods.lora."],
    "fit run.compile=": [f"run.compile={word}" for word in ("true", "false", "auto")],
    "fit optim.sch": ["optim.schedule="],
    "fit optim.schedule=co": ["optim.schedule=constant", "optim.schedule=cosine"],
    "check pl": ["plan="],
    "data": ["data"],
    "data ": list(COMMANDS),
    "data inspect st": ["step="],
    "data inspect recipe=lora data.sou": ["data.source="],
    "data world ": [f"{name}=" for name in COMMANDS["world"][1].model_fields],
    "list m": ["methods"],
    "help methods.dor": ["methods.dora", "methods.dora."],
    "help optim.lr": ["optim.lr", "optim.lrs"],
    "completion ": ["bash", "zsh"],
    "import format=au": ["format=auto"],
    **{
        f"{command} ": [f"{name}=" for name in keys_of(record)]
        for command, record in command_records().items()
        if command in ("sample", "evaluate", "export", "import", "merge")
    },
}
places = pytest.mark.parametrize("typed", PLACES, ids=lambda typed: typed.strip() or "nothing")
starts = pytest.mark.parametrize("start", ["attention-trainer", "python -m trainer"])
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `completion` prints, by shell."""
    folder, found = tmp_path_factory.mktemp("completion"), {}
    for shell in ("bash", "zsh"):
        made = subprocess.run(
            [sys.executable, "-m", "trainer", "completion", shell],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert made.stderr == ""
        found[shell] = folder / shell
        found[shell].write_text(made.stdout)
    return found


def asked(*command: str) -> list[str]:
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.stderr == ""
    return [line for line in found.stdout.splitlines() if line]


def bash(script: Path, line: str, breaks: str = " \t\n=:") -> list[str]:
    text = ASK_BASH.format(
        script=shlex.quote(str(script)), line=shlex.quote(line), breaks=shlex.quote(breaks)
    )
    return asked("bash", "--norc", "-c", text)


@starts
@places
def test_bash_offers_what_there_is(typed: str, start: str, script: dict[str, Path]) -> None:
    """After an `=`, which ends a word of readline's, only the rest is offered."""
    wanted = PLACES[typed]
    last = typed.rpartition(" ")[2]
    begun = last[: last.find("=") + 1]
    line = f"{start} {typed}"
    assert bash(script["bash"], line) == [word.removeprefix(begun) for word in wanted]
    assert bash(script["bash"], line, breaks=" \t\n") == wanted


def test_bash_leaves_the_rest_to_others(script: dict[str, Path]) -> None:
    """Nothing is offered where files are, so that the shell's own completion of files follows; and
    whatever completed python before still does."""
    for line in ("attention-trainer fit data.concept=./ph", "attention-trainer fit recipe=./m"):
        assert bash(script["bash"], line) == []
    assert bash(script["bash"], "python -m json.tool ") == []
    other = script["bash"].with_name("other")
    earlier = "earlier() { COMPREPLY=(mine); }\ncomplete -F earlier python\n"
    twice = f"source {script['bash']}\n" * 2
    other.write_text(earlier + twice)
    assert bash(other, "python -m json.tool ") == ["mine"]
    assert bash(other, "python -m trainer fi") == ["fit"]


def test_bash_starts_no_python(
    script: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key press does not wait for Python: where there is none, all is offered."""
    for name in ("bash", "sed"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bash(script["bash"], "attention-trainer fi") == ["fit"]


@needs_zsh
@starts
@places
def test_zsh_offers_what_there_is(typed: str, start: str, script: dict[str, Path]) -> None:
    *words, last = f"{start} {typed}".split(" ")
    function = "_attention_trainer" + ("" if start == "attention-trainer" else "_python")
    text = ASK_ZSH.format(
        script=shlex.quote(str(script["zsh"])),
        words=shlex.join(words),
        last=shlex.quote(last),
        function=function,
    )
    assert sorted(asked("zsh", "-f", "-c", text)) == sorted(PLACES[typed])


@pytest.mark.parametrize("words", [[], ["fish"], ["bash", "zsh"]], ids=str)
def test_another_shell(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *words]) == BAD_RECIPE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("give the shell, as in `python -m trainer completion bash` or zsh\n")


def test_it_imports_no_torch() -> None:
    code = (
        "import sys; from trainer.__main__ import main; main(['completion', 'bash'])\n"
        "print('loaded:', {'torch', 'diffusers', 'transformers', 'lightning'} & set(sys.modules))"
    )
    assert asked(sys.executable, "-c", code)[-1] == "loaded: set()"
