"""How a loaded backbone reads prompts: in one call of its text encoder, or in parts, as user
interfaces read long ones.

    ids of 150 tokens -> begin + 75 + end, begin + 75 + end -> two calls -> their outputs in a row

Each part of a CLIP prompt has a begin and an end of its own, as in A1111's web UI and ComfyUI
(sd-scripts, max_token_length=150, encodes the same parts and then leaves out the inner begins and
ends). A text encoder without a limit of positions, as T5, takes a longer prompt in one call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from trainer.attention.read_prompt import WORDS, ReadPrompt
from trainer.backbones.family import ChatTemplate
from trainer.backbones.prompt_reader import PromptReader
from trainer.backbones.prompt_tokens import check_parts, lower_but
from trainer.backbones.word_vectors import with_all_vectors

# words of a text: one in pointed brackets as added to a vocabulary, letters and digits, punctuation


@dataclass(frozen=True)
class Prompts:
    """The prompts of a backbone as the text encoder called `part` gets them, with the words it has
    now."""

    backbone: Any  # a `Backbone`
    part: str = "text_encoder"

    @property
    def tokenizer(self) -> Any:
        return self.backbone.tokenizers[self.part]

    @cached_property
    def _marks(self) -> tuple[list[int], list[int]]:
        """The tokens before and after those of a text."""
        whole, own = self.tokenizer(self.around("a")).input_ids, self.ids("a")
        start = next(i for i in range(len(whole)) if whole[i : i + len(own)] == own)
        return whole[:start], whole[start + len(own) :]

    @cached_property
    def _one_call(self) -> int:
        """Tokens of one call without text.max_tokens, with those of begin and end."""
        most = int(self.tokenizer.model_max_length)
        length = self.backbone.prompt_lengths.get(self.part)
        return most if length is None else min(length, most)

    @cached_property
    def reader(self) -> PromptReader:
        chunk = self._one_call - sum(map(len, self._marks))
        added = self.tokenizer.get_added_vocab()
        return PromptReader(self.ids, self.backbone.max_tokens or chunk, chunk=chunk, added=added)

    @cached_property
    def parts(self) -> int:
        """Calls of the text encoder for a prompt."""
        most = self.backbone.max_tokens
        if most is None or not self._limited:
            return 1
        check_parts(most, self.reader.chunk)
        return most // self.reader.chunk

    @property
    def _limited(self) -> bool:
        config = self.backbone.text_encoders[self.part].config
        kind = str(getattr(config, "model_type", ""))
        return kind.startswith("clip")

    @cached_property
    def length(self) -> int:
        """Tokens of all parts whose features the denoiser gets, with begins, ends and padding."""
        most = self.backbone.max_tokens
        if most is None:
            return self._one_call - self._dropped
        return most - self._dropped + self.parts * sum(map(len, self._marks))

    @property
    def vocabulary(self) -> Collection[str]:
        """All tokens and words that there are."""
        found: Collection[str] = self.tokenizer.get_vocab()
        return found

    def example(self, words: Sequence[str]) -> str:
        """A prompt with these words."""
        return " ".join(("a photo of", *words))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without begin and end."""
        found: list[int] = self.tokenizer(self.as_read(text), add_special_tokens=False).input_ids
        return found

    def tokens(self, prompts: Sequence[str]) -> Any:
        """input_ids and attention_mask (b parts, n), the parts of a prompt adjacent."""
        tokenizer, texts = self.tokenizer, [self.around(self.as_read(text)) for text in prompts]
        if self.parts == 1:
            return tokenizer(
                texts,
                padding="max_length" if self.template is None else self.template.padding,
                max_length=self.length + self._dropped,
                truncation=True,
                return_tensors="pt",
            )
        begin, end = self._marks
        chunk = self.reader.chunk
        rows = []
        for text in prompts:
            ids = self.ids(text)
            rows += [
                [*begin, *ids[number * chunk : (number + 1) * chunk], *end]
                for number in range(self.parts)
            ]
        return tokenizer.pad(
            {"input_ids": rows},
            padding="max_length",
            max_length=self.length // self.parts,
            return_tensors="pt",
        )

    def places(self, prompt: str, word: str) -> list[int]:
        """Where the first token of a word is among those that the denoiser gets of a prompt.
        Tokenizers of bytes have other tokens for it at the start of a text than inside one."""
        row = self.tokens([prompt]).input_ids.flatten().tolist()[self._dropped :]
        known, added = self.tokenizer.get_vocab(), self.tokenizer.get_added_vocab()
        forms = [[known[word]]] if word in known else []
        if word not in added:
            forms += [self.ids(word), self.ids(f" {word}")]
        return [i for i in range(len(row)) if any(row[i : i + len(own)] == own for own in forms)]

    def read(self, prompt: str) -> ReadPrompt:
        """The words of a prompt, and which of the tokens that the denoiser gets each of them is.

        Raises:
            ValueError: the tokens of the text are not found again in what the text encoder reads.
        """
        found = list(WORDS.finditer(prompt))
        # a tokenizer reads the beginning of a text as it does within the text
        counts = [0, *(len(self.ids(prompt[: word.end()])) for word in found)]
        places = self._places_in_row(prompt)
        return ReadPrompt(
            text=prompt,
            words=tuple(word.group() for word in found),
            tokens=tuple(tuple(places[first:last]) for first, last in pairwise(counts)),
            length=self.length,
        )

    def _places_in_row(self, prompt: str) -> list[int]:
        """Where the tokens of a text that are read are among those that the denoiser gets."""
        ids = self.ids(prompt)[: self.reader.read]
        if self.parts > 1:
            chunk, begin = self.reader.chunk, len(self._marks[0])
            part = self.length // self.parts
            return [i // chunk * part + begin + i % chunk for i in range(len(ids))]
        row = self.tokens([prompt]).input_ids[0].tolist()[self._dropped :]
        starts = [at for at in range(len(row)) if row[at : at + len(ids)] == ids]
        if ids and not starts:
            raise ValueError(
                f"the tokens of the prompt {prompt!r} are others within what this text encoder "
                "reads around it, so its words cannot be told apart; choose another prompt"
            )
        return [starts[0] + i for i in range(len(ids))] if ids else []

    @property
    def template(self) -> ChatTemplate | None:
        declared: ChatTemplate | None = self.backbone.declared.template
        return declared

    @property
    def _dropped(self) -> int:
        return 0 if self.template is None else self.template.dropped

    def around(self, text: str) -> str:
        """A text with what its text encoder reads around it."""
        return text if self.template is None else self.template.around(text)

    def as_read(self, text: str) -> str:
        """As its tokenizer gets it: one word for several vectors followed by the others."""
        added = self.tokenizer.get_added_vocab()
        text = with_all_vectors(text, added)
        return lower_but(text, added) if self.backbone.declared.lower_case else text
