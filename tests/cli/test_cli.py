"""The command line: what it prints, how it ends, and that it says what is wrong and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.__main__ import main
from trainer.cli.usage import VERBS, usage
from trainer.common.exit_codes import BAD_RECIPE

CUSTOM = "recipe=custom_diffusion"
PROMPT = "prompt=a <v1> on a beach"
Printed = pytest.CaptureFixture[str]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )


def refusal(printed: Printed, *words: str) -> str:
    """The one line that `main` answers a mistake with."""
    assert main([*words]) == BAD_RECIPE
    out, err = printed.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.strip().removeprefix("error: ")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_usage(words: list[str], capsys: Printed) -> None:
    assert main(words) == 0
    assert capsys.readouterr() == (usage(), "")


def test_usage_names_every_verb_with_a_sentence() -> None:
    lines = usage().splitlines()[2:]
    rows = [line.split(maxsplit=1) for line in lines[: lines.index("")]]
    assert [name for name, _ in rows] == list(VERBS)
    assert all(about.endswith(".") and "`fit`:" not in about for _, about in rows)


def test_usage_and_list_import_nothing_heavy() -> None:
    code = (
        "import sys; from trainer.__main__ import main; main(['--help'])\n"
        "heavy = {'torch', 'pydantic', 'yaml', 'omegaconf', 'numpy', 'PIL'}\n"
        "helped = heavy & set(sys.modules); main(['list'])\n"  # which reads every recipe
        "listed = {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
        "print('loaded:', helped | listed)"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded: set()"


def test_mistake_ends_the_process_with_its_code() -> None:
    result = run("-m", "trainer", "fit", "recipe=custom_difusion")
    assert result.returncode == 78
    assert result.stdout == ""
    hint = "did you mean custom_diffusion?"
    assert result.stderr == f"error: recipe=custom_difusion: no such recipe; {hint}\n"


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    line = [sys.executable, "-m", "trainer", "list"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_check_as_a_process_loads_no_torch() -> None:
    code = (
        "import sys; from trainer.__main__ import main\n"
        f"print(main(['check', '{CUSTOM}', 'run.steps=3']), 'torch' in sys.modules)"
    )
    *_, fine, last = run("-c", code).stdout.splitlines()
    assert fine.startswith("custom_diffusion: fine; backbone tiny, methods selective, new_token")
    assert last == "0 False"


@pytest.mark.parametrize(
    ("verb", "hint"),
    [("tain", ""), ("fitt", "; did you mean fit?"), ("sampel", "; did you mean sample?")],
)
def test_unknown_verb(verb: str, hint: str, capsys: Printed) -> None:
    assert main([verb, CUSTOM]) == BAD_RECIPE
    err = capsys.readouterr().err
    assert err == f"error: no verb is called {verb!r}{hint}\n{usage()}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fit",), "recipe=<name> is missing; recipes: "),
        (("fit", CUSTOM, "optim.lrr=1"), "optim.lrr: no such key; did you mean optim.lr?"),
        (("fit", CUSTOM, "data.concept=./nowhere"), "data.concept='./nowhere': nowhere: no such"),
        (("check", CUSTOM, "run.steps=0"), "run.steps=0: a whole number is needed, at least 1"),
        (("check", CUSTOM, "plan=maybe"), "plan='maybe': true or false is needed"),
        (("check", "custom_diffusion"), "'custom_diffusion' is not key=value"),
        (("sample",), 'prompt is missing, as in prompt="a <v1>'),
        (("sample", "prompt="), "prompt is missing"),
        (("sample", PROMPT), "give adapter=<file or run folder>, or backbone=<name or folder>"),
        (("sample", PROMPT, "adaptor=x"), "adaptor: no such key; did you mean adapter?"),
        (("sample", PROMPT, "count=0"), "count=0: a whole number is needed, at least 1"),
        (("sample", PROMPT, "count=true"), "count=True: a whole number is needed"),
        (("sample", PROMPT, "steps=2.5"), "steps=2.5: a whole number is needed, at least 1"),
        (("sample", PROMPT, "seed=-1"), "seed=-1: a whole number is needed, at least 0"),
        (("sample", PROMPT, "guidance=high"), "guidance='high': a number is needed"),
        (("sample", "prompt=12"), "prompt=12: text is needed; quote it, as in prompt=\"'12'\""),
        (("sample", PROMPT, "backbone=tiny", "methods=3"), "methods=3: "),
        (("evaluate",), "run is missing, as in run=runs/custom_diffusion/<id>"),
        (("evaluate", "run=x", "images=0"), "images=0: a whole number is needed, at least 1"),
        (("export", "run=x"), "adapter=x: no such file"),
        (("export", "run=x", "out=y"), "adapter=x: no such file"),
        (("export", "out=x"), "give run=<run folder>, or adapter=<file>"),
        (("export", "run=x", "adapter=y"), "give run or adapter, not both"),
        (("import", "file=x", "out=y"), "backbone is missing, as in backbone=sd15"),
        (("merge", "adapter=x", "out=y"), "adapter='x': a list is needed, as in adapter=[x]"),
        (("data", "verify"), "give shards=<folder or .tar>, or folder=<photos>, and not both"),
        (("data", "wrld"), "data world, clips, build, verify, inspect: 'wrld' is none of them"),
        (("data", "world"), "out is missing, as in out=./world"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistake(words: tuple[str, ...], says: str, capsys: Printed) -> None:
    assert refusal(capsys, *words).startswith(says)


class Canary:
    """Unpickling one makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_adapter_that_is_no_adapter(tmp_path: Path, capsys: Printed) -> None:
    sample = ("sample", PROMPT, f"out={tmp_path / 'out'}")
    adapter, run_folder = tmp_path / "x.safetensors", tmp_path / "run"
    assert refusal(capsys, *sample, f"adapter={adapter}") == f"adapter={adapter}: no such file"
    run_folder.mkdir()
    wanted = f"adapter={run_folder}/adapter.safetensors: no such file"
    assert refusal(capsys, *sample, f"adapter={run_folder}") == wanted
    torch.save({"weight": Canary(tmp_path / "sprung")}, adapter)
    message = refusal(capsys, *sample, f"adapter={adapter}")
    assert message.startswith(f"adapter={adapter}: not a safetensors file")
    assert message.endswith("pickles are never loaded")
    assert not (tmp_path / "sprung").exists()
    save_file({"weight": torch.ones(2)}, adapter, {"format": "pt"})
    message = refusal(capsys, *sample, f"adapter={adapter}")
    assert message.startswith(f"adapter={adapter}: its header has no 'attention_trainer'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(28, "No space left on device"), 74), (PermissionError(13, "denied"), 1)],
    ids=["full-disk", "denied"],
)
def test_trouble_with_the_disk_has_codes_of_its_own(
    error: OSError, code: int, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr("trainer.cli.fit.run", fail)
    assert main(["fit", CUSTOM]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cli.fit.run", lambda words: {}["missing"])
    with pytest.raises(KeyError):
        main(["fit", CUSTOM])


def test_check_says_what_a_run_folder_would_refuse(tmp_path: Path, capsys: Printed) -> None:
    """By the manifest of its last checkpoint and the header of its adapter, without torch."""
    from trainer.config.load import load_recipe
    from trainer.runs.run_folder import recipe_header

    words = ["recipe=lora", "data.token=<v1>", f"run.out={tmp_path}", "run.id=one", "run.steps=9"]
    folder = tmp_path / "lora" / "one" / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    facts = {"recipe": recipe_header(load_recipe(words)), "step": 4, "micro_step": 4}
    (folder / "manifest.json").write_text(json.dumps(facts))
    assert main(["check", *words, "optim.lr=1e-6"]) == 0
    for word, says in {"run.seed=5": "run.seed=0 (now 5)", "run.steps=3": "below step 4"}.items():
        given = [each for each in words if each.split("=")[0] != word.split("=")[0]]
        assert main(["check", *given, word]) == 78
        assert says in capsys.readouterr().err
