"""Full training: every parameter of the denoiser, and of the text encoders if asked.

theta <- theta - lr * grad, for all theta: the upper line every smaller method is held against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from trainer.methods import Edit, Method

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Full(Method):
    """denoiser, text_encoder: which of the two train."""

    kind: ClassVar[Literal["select"]] = "select"
    denoiser: bool = True
    text_encoder: bool = False

    def apply(self, model: AttentionModel) -> Edit:
        parts: list[str] = [model.denoiser_name] if self.denoiser else []
        if self.text_encoder:
            parts += list(model.text_encoders)
        trains = [name for name, _ in model.named_parameters() if name.split(".")[0] in parts]
        if not trains:
            raise ValueError(
                "denoiser and text_encoder are both false, so it trains nothing; set one to true"
            )
        return Edit(
            sites=tuple(site.name for site in model.sites) if self.denoiser else (),
            claims=tuple((name, "weight") for name in trains),
            trains=tuple(trains),
        )
