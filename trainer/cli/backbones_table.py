"""The table of backbones that `list backbones` prints, and the page `docs/backbones.md`, made from
what the files in `recipes/backbone/` say. They are read as text, so nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.common.declared import header_of
from trainer.common.paths import BACKBONES

# how headers say it; their first sentence is `<title>: <pixels>, <what it predicts>.`
FACTS = {
    "pixels": r"\b(\d+x\d+(?:x\d+)?)\b",
    "predicts": r"\b\d+x\d+[^,.]*, (eps|v|x0|flow)\b",
    "licence": r"[Ll]icence (.+?)\.(?=\s|$)",
    "parameters": r"([\d.]+ [BM]) parameters",
    "memory": r"([\d.]+ GB) of memory",
}
TITLE = """# Backbones

The models that recipes name in `backbone=`, beside any folder in diffusers layout, any checkpoint
of Stable Diffusion in one file and any finished run. Made by

    python -m trainer list backbones format=markdown > docs/backbones.md

from the headers of `recipes/backbone/`; change those, not this page. Memory is main memory while
the weights are read in fp32; [Memory](memory.md) says when they take half of it. `python -m trainer
check recipe=lora backbone=<name> plan=true` says what a run takes, part by part, before anything is
downloaded.

Every family is tried on a tiny folder of the published classes, with random weights: it samples
what the stock pipeline of diffusers does, within 2/255, and that pipeline reads the adapters that
are trained on it (`python bench/families.py`). Chroma is compared with a pipeline that masks
padding, as diffusers 0.42 adds the mask to the scores as numbers. No published weights are part of
these tests, and memory was counted, not measured.

A backbone of the family `dit` is told a class instead of a text: prompts and captions are the names
of its classes, or their numbers. The folders of PixArt have T5's vocabulary in a file that the
extra `t5` reads: `pip install 'attention-trainer[t5]'`.
"""
HUB = ("name", "family", "what", "pixels", "predicts", "parameters", "memory", "licence", "from")
SHIPPED = ("name", "family", "what")


@dataclass(frozen=True)
class ListedBackbone:
    """A backbone as its file tells it; empty for what it does not. pixels, predicts: what it was
    trained at and on; memory: that loading takes; hub, revision: where it is published, empty for
    one that ships."""

    name: str
    family: str
    sentence: str
    hub: str = ""
    revision: str = ""
    pixels: str = ""
    predicts: str = ""
    licence: str = ""
    parameters: str = ""
    memory: str = ""

    @property
    def title(self) -> str:
        return self.sentence.partition(":")[0] if self.hub else self.sentence

    def cell(self, column: str) -> str:
        if column == "from":
            commit = self.revision if "/" in self.revision else self.revision[:8]
            return f"`{self.hub}` at `{commit}`"
        return self.title if column == "what" else str(getattr(self, column))


def listed_backbones() -> list[ListedBackbone]:
    """All of them, those of the hub first."""
    found = [_listed(path) for path in sorted(BACKBONES.glob("*.yaml"))]
    return sorted(found, key=lambda each: not each.hub)


def _listed(path: Path) -> ListedBackbone:
    lines = header_of(path)
    text = " ".join(lines)
    facts = {name: _found(pattern, text) for name, pattern in FACTS.items()}
    # three keys of one line each, which need no YAML reader
    body = path.read_text(encoding="utf-8")
    keys = ("family", "hub", "revision")
    own = {key: _found(rf"(?m)^{key}: *(\S+)", body) for key in keys}
    return ListedBackbone(name=path.stem, sentence=lines[0], **own, **(facts if own["hub"] else {}))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def backbones_markdown() -> str:
    """The page as Markdown."""
    every = listed_backbones()
    on_hub, here = (
        [each for each in every if bool(each.hub) == wanted] for wanted in (True, False)
    )
    return (
        TITLE
        + "\n## On the hub\n\n"
        + _markdown(HUB, on_hub)
        + "\n## That ship, or start from nothing\n\n"
        + _markdown(SHIPPED, here)
    )


def _markdown(columns: Sequence[str], rows: Sequence[ListedBackbone]) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns)]
    lines += [[each.cell(column) for column in columns] for each in rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines
    )
