"""How the program is started, and that what it prints can be typed again."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.common.program import as_started, command_line, program
from trainer.common.version import LIBRARIES, own_version

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The console script, as pip writes one for the entry in `pyproject.toml`."""
    declared = tomllib.loads(PROJECT.read_text())["project"]["scripts"]["attention-trainer"]
    module, _, name = declared.partition(":")
    assert callable(EntryPoint("attention-trainer", declared, "console_scripts").load())
    path = tmp_path / "attention-trainer"
    path.write_text(f"import sys\nfrom {module} import {name}\nsys.exit({name}())\n")
    return path


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_script_does_what_the_module_does(script: Path) -> None:
    for words in (["list", "recipes"], ["fit"], ["help", "run.steps"], ["-V"]):
        one, other = run(str(script), *words), run("-m", "trainer", *words)
        assert (one.returncode, one.stdout) == (other.returncode, other.stdout)
        assert one.stderr == other.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage: attention-trainer <verb> [key=value ...]"),
        (["help", "fit"], "\n  attention-trainer fit recipe=custom_diffusion\n"),
        (["help", "methods.dora"], "\n  attention-trainer fit recipe=dora\n"),
        (["help", "recipe.lora"], "\n    attention-trainer fit recipe=lora\n"),
        (["help", "list"], "`attention-trainer list [recipes|"),
        (["completion", "bash"], "# Completes attention-trainer in bash"),
        (["completion"], "`attention-trainer completion bash`"),
        (["fitt"], "did you mean fit?\nusage: attention-trainer <verb>"),
    ],
    ids=" ".join,
)
def test_the_script_prints_its_own_name(words: list[str], says: str, script: Path) -> None:
    ended = run(str(script), *words)
    printed = ended.stdout + ended.stderr
    assert says in printed
    if words[:1] != ["completion"]:
        assert "python -m trainer" not in printed


def test_errors_name_the_program_that_was_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise ValueError("generate with `python -m trainer sample adapter=...`")

    monkeypatch.setattr("trainer.cli.fit.run", fail)
    for started, name in (("/usr/bin/attention-trainer", "attention-trainer"),
                          ("/x/trainer/__main__.py", "python -m trainer")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [started])
        assert program() == name
        assert as_started("a python -m trainer b") == f"a {name} b"
        assert main(["fit"]) == 78
        assert capsys.readouterr().err == f"error: generate with `{name} sample adapter=...`\n"


@pytest.mark.parametrize("word", ["-V", "--version", "version"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    out, err = capsys.readouterr()
    first, python, *rest = out.splitlines()
    assert (first, err) == (f"attention-trainer {own_version()}", "")
    assert python.startswith("python 3.")
    assert rest == [f"{name} {version(name)}" for name in LIBRARIES]
    assert {"torch", "lightning", "diffusers"} <= set(LIBRARIES)


def test_version_imports_nothing() -> None:
    code = (
        "import sys; from trainer.__main__ import main; main(['--version'])\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'peft', 'pydantic', 'numpy'}\n"
        "print('loaded:', heavy & set(sys.modules))"
    )
    assert run("-c", code).stdout.splitlines()[-1] == "loaded: set()"


def test_version_of_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.common.version.LIBRARIES", ("no_such_library",))
    assert main(["-V"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no_such_library is not installed"


@pytest.mark.parametrize(
    ("started", "wanted"),
    [
        ("/x/trainer/__main__.py", "python -m trainer fit recipe=lora 'preview.prompts=[a fox]'"),
        (
            "/usr/bin/attention-trainer",
            "attention-trainer fit recipe=lora 'preview.prompts=[a fox]'",
        ),
        ("/x/pytest/__main__.py", None),
        ("notebook.py", None),
        ("", None),
    ],
)
def test_a_command_can_be_typed_again(
    started: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "recipe=lora", "preview.prompts=[a fox]"]
    monkeypatch.setattr(sys, "argv", [started, *words])
    assert command_line() == wanted
