"""What stands for a tokenizer whose vocabulary is not on this machine, while a recipe is planned:
it has as many tokens as its text encoder, and takes every word for one token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainer.backbones.prompt_reader import UNLIMITED, length_in

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def has_vocabulary(where: Path) -> bool:
    """Whether a tokenizer's folder has more than its options."""
    return any((where / name).is_file() for name in VOCABULARIES)


class UnreadTokenizer:
    """options: of its tokenizer_config.json; count: the tokens of its text encoder."""

    unk_token_id = pad_token_id = bos_token_id = eos_token_id = None

    def __init__(self, options: Mapping[str, Any], count: int) -> None:
        self.model_max_length = length_in(options.get("model_max_length")) or UNLIMITED
        self._count, self._words, self._added = count, dict[str, int](), dict[str, int]()

    def __len__(self) -> int:
        return self._count + len(self._added)

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        """One id for each word, another for each."""
        number = self._words.setdefault(text, len(self._words) + 3)  # behind the special tokens
        return SimpleNamespace(input_ids=[number])

    def get_vocab(self) -> dict[str, int]:
        return self.get_added_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        return dict(self._added)

    def add_tokens(self, tokens: Sequence[Any]) -> int:
        for token in map(str, tokens):
            self._added.setdefault(token, len(self))
        return len(tokens)


def unread_tokenizer(where: Path, text_encoder: Path) -> UnreadTokenizer:
    """That of two folders of a pipeline, of a tokenizer and of its text encoder."""
    options, config = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (where / "tokenizer_config.json", text_encoder / "config.json")
    )
    return UnreadTokenizer(options, int(config["vocab_size"]))
