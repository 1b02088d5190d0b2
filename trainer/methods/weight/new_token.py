"""New tokens: new words are added to the vocabulary, each one row of the text encoder's embedding,
and only those rows train.

Textual inversion (arXiv 2208.01618, section 4); Custom Diffusion trains the same rows beside K and
V. A row starts as the embedding of a known word, or as noise with the mean and spread of the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from trainer.methods.method import Edit, EditKind, Method

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class NewToken(Method):
    """Which words, and where their rows start."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "Textual Inversion"
    paper: ClassVar[str] = "arXiv 2208.01618"
    adds_words: ClassVar[bool] = True

    tokens: tuple[str, ...] = Field(
        ("<v1>",), min_length=1, description="the new words; a recipe without them takes data.token"
    )
    init: str | tuple[str, ...] | None = Field(
        None,
        description="the known word whose row each token starts from, one for all or one each; "
        "null starts from noise with the mean and spread of the table",
    )
    task: int | None = Field(
        None,
        ge=0,
        description="for concepts learned one after another: only token number task trains, "
        "earlier ones stay, later ones do not exist yet. A continual recipe sets it",
    )

    @field_validator("tokens")
    @classmethod
    def _words(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        for token in tokens:
            if not token.strip() or any(letter.isspace() for letter in token):
                raise ValueError(f"{token!r} is no single word; write it like <v1>")
        if len({token.lower() for token in tokens}) != len(tokens):  # CLIP reads lower case
            raise ValueError("a token is named twice")
        return tokens

    @model_validator(mode="after")
    def _agrees(self) -> NewToken:
        words, tokens = self.init, len(self.tokens)
        if isinstance(words, tuple) and len(words) != tokens:
            raise ValueError(
                f"init has {len(words)} words for {tokens} tokens; give one for all, or one each"
            )
        if self.task is not None and self.task >= tokens:
            raise ValueError(f"task={self.task} is beyond the {tokens} tokens; count from 0")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        return self.tokens if self.task is None else self.tokens[: self.task + 1]

    @property
    def trained_words(self) -> tuple[str, ...]:
        return () if self.task is None else self.tokens[self.task : self.task + 1]

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.model import check_reads_text
        from trainer.ops.adapters.token_rows import errors_of, extend

        check_reads_text(model)
        count = len(self.tokens) if self.task is None else self.task + 1
        words = self.init if isinstance(self.init, tuple) else (self.init,) * count
        trains: list[str] = []
        keeps: list[str] = []
        for part, encoder in model.text_encoders.items():
            module: Any = encoder
            with errors_of(part, model.text_encoders.keys()):
                rows = extend(
                    module, model.tokenizers[part], tokens=self.tokens[:count], words=words[:count]
                )
            names = [f"{part}.{row}" for row in rows]
            first = 0 if self.task is None else self.task
            keeps += names[:first]
            trains += names[first:]
        claims = tuple((name, "weight") for name in (*trains, *keeps))
        return Edit(claims=claims, trains=tuple(trains), keeps=tuple(keeps))
