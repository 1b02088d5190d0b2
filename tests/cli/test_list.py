"""`list`: everything there is in whole sentences, and the methods' page made from the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.cli.methods_table import methods_table, recipes_of
from trainer.common.declared import commands_in, declared, header_of, measured_in
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.lookup import LEVELS, method_files, source_files
from trainer.config.lineage import backbone_names
from trainer.config.load import recipe_names
from trainer.methods.apply import find_method

ROOT = Path(__file__).parents[2]
Printed = pytest.CaptureFixture[str]


def entries(out: str) -> list[tuple[str, str]]:
    """Names and texts of what `list` printed, wrapped lines joined."""
    found: list[tuple[str, str]] = []
    for line in out.splitlines():
        if line.startswith(" " * 22):
            name, text = found.pop()
            found.append((name, f"{text} {line.strip()}"))
        elif line.startswith("  "):
            name, _, text = line.strip().partition(" ")
            found.append((name, text.strip()))
    return found


def test_list_prints_everything_in_sentences(capsys: Printed) -> None:
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    files = [path.stem for path in (*method_files(), *source_files())]
    assert [name for name, _ in entries(out)] == [*recipe_names(), *backbone_names(), *files]
    assert [name for name, text in entries(out) if not text.endswith(".")] == []
    assert max(map(len, out.splitlines())) <= 100
    assert err == ""


def test_list_of_methods_gives_level_kind_and_paper(capsys: Printed) -> None:
    assert main(["list", "methods"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("methods:\n") and "recipes:" not in out
    text = dict(entries(out))["selective"]
    assert text.startswith(
        "Selective training: chosen projections of chosen attention sites train,"
    )
    assert text.endswith("A method of the weight level, kind select (arXiv 2212.04488).")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method"], "list method: there are recipes, backbones, methods, data"),
        (["data", "format=markdown"], "format=markdown is for list methods alone"),
        (["format=markdown"], "format=markdown is for list methods alone"),
    ],
)
def test_mistakes(words: list[str], says: str, capsys: Printed) -> None:
    assert main(["list", *words]) == BAD_RECIPE
    assert capsys.readouterr() == ("", f"error: {says}\n")


@pytest.mark.parametrize("path", method_files(), ids=lambda path: path.stem)
def test_what_a_method_declares_as_text_is_what_its_class_has(path: Path) -> None:
    facts, method = declared(path), find_method(path.stem)
    assert (facts.kind, facts.systems, facts.paper) == (method.kind, method.systems, method.paper)
    assert facts.level in LEVELS and facts.systems
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    assert facts.summary == " ".join(first.split()) and facts.summary.endswith(".")


def test_the_page_of_methods_is_what_the_command_prints(capsys: Printed) -> None:
    assert main(["list", "methods", "format=markdown"]) == 0
    wanted = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == wanted, (
        "python -m trainer list methods format=markdown > docs/methods.md"
    )


def test_rows_of_the_page() -> None:
    rows = {
        line.split("[`")[1].split("`]")[0]: line
        for line in methods_table().splitlines()
        if "[`" in line
    }
    assert list(rows) == sorted(
        (path.stem for path in method_files()),
        key=lambda name: (LEVELS.index(declared_level(name)), name),
    )
    lora = [cell.strip() for cell in rows["lora"].strip("|").split("|")]
    assert lora[0] == "LoRA, MotionLoRA"
    assert lora[3] == "arXiv [2106.09685](https://arxiv.org/abs/2106.09685)"
    assert lora[4].startswith("[`lora`](../recipes/lora.yaml), ")
    assert lora[5].startswith("by `python bench/weight_level.py`")
    assert lora[5].endswith("3.1 points of the known sprites are lost.")
    assert rows["tiled"].endswith("|  |  |")  # no recipe has it


def declared_level(name: str) -> str:
    return next(path.parent.name for path in method_files() if path.stem == name)


def test_recipes_of_a_method() -> None:
    assert recipes_of("selective")[0] == "custom_diffusion"
    assert recipes_of("nf4") == ["qlora"]
    assert recipes_of("word_embedding") == ["animatediff"]  # for the backbone tiny alone
    assert "lora" not in recipes_of("new_token")  # it has the method from its base


def test_commands_and_measurement_of_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "# A first sentence.\n#\n"
        "#     python -m trainer fit recipe=a \\\n#         run.id=x   # why\n"
        "#     python -m trainer sample out=b\n# Said. Measured by `x.py` (y.json): 1.5 of\n"
        "# 3. And more. Measured otherwise.\ndata: {}\n# not the header\n"
    )
    lines = header_of(path)
    assert lines[0] == "A first sentence." and lines[-1] == "3. And more. Measured otherwise."
    assert commands_in(lines) == [
        "python -m trainer fit recipe=a run.id=x",
        "python -m trainer sample out=b",
    ]
    assert measured_in(lines) == "Measured by `x.py` (y.json): 1.5 of 3."
    assert measured_in(["nothing"]) == ""
