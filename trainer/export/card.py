"""What an export says of itself: its backbone, the words that call it, the size it was trained at.

All files of an export carry this in their headers, as ModelSpec has it, and the README says it. The
name of a folder is said, but never the path to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.backbones.word_vectors import first_vectors
from trainer.common.paths import bare_name
from trainer.config.lineage import spec_of
from trainer.data.caption_templates import texts_of, with_class_words
from trainer.data.source import frames_asked

SPEC = "1.0.1"


@dataclass(frozen=True)
class Card:
    """The facts about an adapter that its files carry.

    title: what to call it; backbone: the name of what it goes on, hub and revision where it comes
    from, if it is on the hub; trained: its words, as in `<v1>`; phrase: how a prompt names them,
    as in `<v1> cup`; size: width and height in pixels that it was trained at, None if unknown;
    frames: of a clip, 1 for pictures; methods: the names of what trained it.
    """

    title: str = ""
    backbone: str = ""
    hub: str | None = None
    revision: str | None = None
    trained: tuple[str, ...] = ()
    phrase: str = ""
    size: tuple[int, int] | None = None
    frames: int = 1
    methods: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """A prompt that calls what was trained."""
        return f"a photo of {self.phrase}" if self.phrase else "a photo"

    @property
    def entries(self) -> dict[str, str]:
        """Entries of a file's header."""
        known = {
            "modelspec.sai_model_spec": SPEC,
            "modelspec.title": self.title,
            "modelspec.trigger_phrase": self.phrase,
            "modelspec.resolution": f"{self.size[0]}x{self.size[1]}" if self.size else "",
        }
        return {key: value for key, value in known.items() if value}


def card_of(title: str, tree: Mapping[str, Any], model: Any, *, words: Iterable[str]) -> Card:
    """The card of an adapter. tree: its recipe; words: those it has trained."""
    spec, data = spec_of(tree), tree.get("data") or {}
    side = (tree.get("run") or {}).get("resolution") or model.resolution
    known = tuple(words) or texts_of(data.get("token"))
    return Card(
        title=_one_line(title),
        backbone=_one_line(bare_name(tree["backbone"])),
        hub=spec.hub,
        revision=spec.revision,
        trained=tuple(map(_one_line, known)),
        phrase=_one_line(", ".join(with_class_words(first_vectors(known), data))),
        size=(int(side), int(side)),
        frames=frames_asked(data),
        methods=tuple(_one_line(n) for n, given in tree["methods"].items() if given is not None),
    )


def _one_line(text: str) -> str:
    """Text that a stranger's file may give, without line breaks: in a README, a line of its own
    could pass for code."""
    return " ".join(text.split())
