"""The prompts of a backbone that is told a class instead of a text: each is the name of a class or
its number, and the empty one stands for no class. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainer.attention.read_prompt import ReadPrompt
from trainer.backbones.prompt_reader import PromptReader

if TYPE_CHECKING:
    from trainer.backbones.spec import BackboneSpec

LABELS = "id2label"  # in model_index.json: of each number its names, with commas between them


@dataclass(frozen=True)
class ClassNames:
    """count: of the classes, which are numbered from 0; `count` itself stands for no class. labels:
    as `id2label` has them; empty where a folder names none, so that only numbers are known."""

    count: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> dict[str, tuple[int, ...]]:
        """The classes of each name in lower case; some names have two, as `crane` of ImageNet."""
        found: dict[str, tuple[int, ...]] = {}
        for number, names in self.labels.items():
            for name in names.split(","):
                key = name.strip().lower()
                found[key] = (*found.get(key, ()), int(number))
        return found

    def refusal(self, prompt: str) -> str | None:
        """Why a prompt is no class, after the prompt itself; None where it is one."""
        text = " ".join(prompt.lower().split())
        if not text or (text.isdecimal() and int(text) < self.count):
            return None
        if text.isdecimal():
            return f"is no class: their numbers are 0 to {self.count - 1}"
        own = self.numbers.get(text, ())
        if len(own) > 1:
            return f"is the name of classes {' and '.join(map(str, own))}; give the number"
        if own:
            return None
        near = get_close_matches(text, self.numbers, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(near)}?" if near else "its model_index.json names all"
        return (
            "is no class of this backbone, which is told a class by its name or number and reads "
            f"no text; {known if self.labels else f'give a number, 0 to {self.count - 1}'}"
        )

    def number(self, prompt: str) -> int:
        """The class of a prompt.

        Raises:
            ValueError: it is none, or one of two.
        """
        if reason := self.refusal(prompt):
            raise ValueError(f"{prompt!r} {reason}")
        text = " ".join(prompt.lower().split())
        if not text:
            return self.count
        return int(text) if text.isdecimal() else self.numbers[text][0]

    @property
    def reader(self) -> PromptReader:
        return PromptReader(lambda text: (0,), 1, chunk=1, refusal=self.refusal)


@dataclass(frozen=True)
class ClassPrompts:
    """What `Prompts` is to a text encoder, for a backbone that has none."""

    names: ClassNames
    parts = 1
    length = 0  # tokens that the denoiser gets

    @property
    def reader(self) -> PromptReader:
        return self.names.reader

    @property
    def vocabulary(self) -> Collection[str]:
        return ()  # no words in angle brackets

    def places(self, prompt: str, word: str) -> list[int]:
        return []

    def read(self, prompt: str) -> ReadPrompt:
        return ReadPrompt(prompt, words=(), tokens=(), length=0)

    def as_read(self, text: str) -> str:
        return text

    def example(self, words: Sequence[str]) -> str:
        """A prompt that any such backbone reads."""
        return "0"


def class_names(spec: BackboneSpec, denoiser: str) -> ClassNames | None:
    """The classes of a folder; None where its files are not on this machine."""
    from trainer.backbones.folder_facts import read_part

    config = read_part(spec, f"{denoiser}/config.json")
    index = read_part(spec, "model_index.json")
    return None if config is None or index is None else classes_of(config, index)


def classes_of(config: Mapping[str, Any], index: Mapping[str, Any]) -> ClassNames:
    """From the denoiser's config and the index, or the options, of a pipeline."""
    count = config.get("num_embeds_ada_norm", 1000)
    return ClassNames(int(count), index.get(LABELS) or {})
