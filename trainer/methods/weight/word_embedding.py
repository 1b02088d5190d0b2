"""Word embedding: known words, each one row of the text encoder's embedding, learn new meanings.

The rows alone train, as in textual inversion (arXiv 2208.01618, section 4), but of words that the
vocabulary has, and they start as they are: words of motion, say, which stills never explained. A
row is read in every prompt that has its word. Tokenizers of bytes, as Qwen's, have another token
for a word that begins a prompt; that one stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from trainer.methods.method import Edit, EditKind, Method

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class WordEmbedding(Method):
    """Which words train."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "Textual Inversion"
    paper: ClassVar[str] = "arXiv 2208.01618"

    tokens: tuple[str, ...] = Field(
        min_length=1,
        description="known words, each one token of the vocabulary of every text encoder",
        examples=["[left,right]"],
    )

    @field_validator("tokens")
    @classmethod
    def _single(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        for word in tokens:
            if not word.strip() or any(letter.isspace() for letter in word):
                raise ValueError(f"{word!r} is no single word; give them one by one")
        return tokens

    @property
    def known_words(self) -> tuple[str, ...]:
        return self.tokens

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.model import check_reads_text
        from trainer.ops.adapters.token_rows import errors_of, relearn

        check_reads_text(model)
        trains: list[str] = []
        for part, encoder in model.text_encoders.items():
            with errors_of(part, model.text_encoders.keys()):
                rows = relearn(encoder, model.tokenizers[part], self.tokens)
            trains += [f"{part}.{row}" for row in rows]
        return Edit(claims=tuple((name, "weight") for name in trains), trains=tuple(trains))
