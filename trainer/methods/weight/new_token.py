"""New tokens: words of the user's own, each one row of the text encoder's embedding, and only those
rows train.

Textual inversion (arXiv 2208.01618, section 4); Custom Diffusion trains the same rows beside K and
V. The row starts as the embedding of a known word, or as noise of the table's own spread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainer.methods import Edit, Method

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class NewToken(Method):
    """tokens: the new words, as in `<v1>`; init: the known word each starts from, one for all or
    one each."""

    kind: ClassVar[Literal["adapt"]] = "adapt"
    tokens: tuple[str, ...] = Field(("<v1>",), min_length=1)
    init: str | tuple[str, ...] | None = None

    @field_validator("tokens")
    @classmethod
    def _words(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        for token in tokens:
            if not token.strip() or any(letter.isspace() for letter in token):
                raise ValueError(f"{token!r} is no single word; write it like <v1>")
        if len({token.lower() for token in tokens}) != len(tokens):  # CLIP reads lower case
            raise ValueError("a token is named twice")
        return tokens

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.tokens import extend

        words = (
            [self.init] * len(self.tokens) if not isinstance(self.init, tuple) else list(self.init)
        )
        if len(words) != len(self.tokens):
            raise ValueError(
                f"init has {len(words)} words for {len(self.tokens)} tokens; give one for all, "
                "or one each"
            )
        trains: list[str] = []
        for part, encoder in model.text_encoders.items():
            module: Any = encoder
            extend(module, model.tokenizers[part], self.tokens, words)
            trains += [
                f"{part}.{name}" for name, _ in module.named_parameters() if name.endswith(".rows")
            ]
        return Edit(claims=tuple((name, "weight") for name in trains), trains=tuple(trains))
