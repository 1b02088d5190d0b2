"""`list`: everything there is in whole sentences, and the methods' page made from the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.backbones import family_names
from trainer.cli.backbones_table import ListedBackbone, listed_backbones
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


def test_list_prints_everything(capsys: Printed) -> None:
    """Recipes and backbones of the hub in tables, all else in sentences."""
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    firsts = {line.split()[0] for line in out.splitlines() if re.match(r"  \S", line)}
    files = [path.stem for path in (*method_files(), *source_files())]
    assert firsts == {*recipe_names(), *backbone_names(), *files, "name"}
    sentences = dict(entries(out.partition("methods:")[2]))
    assert [name for name, text in sentences.items() if not text.endswith(".")] == []
    assert list(sentences) == files
    assert max(map(len, out.splitlines())) <= 100
    assert err == ""


def test_the_table_of_backbones(capsys: Printed) -> None:
    assert main(["list", "backbones"]) == 0
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    head, row = rows[1], next(row for row in rows if row[0] == "sdxl")
    assert dict(zip(head, row, strict=True)) == {
        "name": "sdxl",
        "family": "sdxl",
        "pixels": "1024x1024",
        "predicts": "eps",
        "parameters": "2.6 B",
        "memory": "13.9 GB",
        "licence": "openrail++",
    }


def test_the_table_of_recipes(capsys: Printed) -> None:
    assert main(["list", "recipes"]) == 0
    rows = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["name", "backbone", "methods", "what"]
    assert ["qlora", "tiny", "new_token, nf4, lora", "QLoRA (NeurIPS 2023, arXiv"] in rows


@pytest.mark.parametrize("listed", listed_backbones(), ids=lambda listed: listed.name)
def test_a_header_of_a_backbone_says_what_the_table_shows(listed: ListedBackbone) -> None:
    """As `<name>: 1024x1024, eps. Licence <name>. 2.6 B parameters. Needs 13.9 GB of memory to
    load.`"""
    assert listed.family in family_names() and listed.sentence.endswith(".")
    if listed.hub:
        assert listed.pixels and listed.predicts and listed.licence and listed.memory
        assert (listed.licence, listed.title) == (listed.licence.strip(), listed.title.strip())
    else:
        assert not listed.revision and listed.pixels == ""


def test_the_page_of_backbones_is_what_the_command_prints(capsys: Printed) -> None:
    assert main(["list", "backbones", "format=markdown"]) == 0
    wanted = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == wanted, (
        "python -m trainer list backbones format=markdown > docs/backbones.md"
    )
    assert [line for name in backbone_names() if (line := f"| {name} |") not in wanted] == []


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
        (["method"], "list method: there are recipes, edits, backbones, methods, data"),
        (["data", "format=markdown"], "format=markdown is for list methods or list backbones"),
        (["format=markdown"], "format=markdown is for list methods or list backbones"),
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
    assert lora[3] == "train"
    assert lora[4] == "arXiv [2106.09685](https://arxiv.org/abs/2106.09685)"
    assert lora[5].startswith("[`lora`](../recipes/lora.yaml), ")
    assert lora[6].startswith("by `python bench/weight_level.py`")
    assert lora[6].endswith("3.1 points of 128 pictures of known sprites are lost.")
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
