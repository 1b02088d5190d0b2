"""One run of one attention layer, as its ops see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.attention.grid import token_grid
from trainer.attention.spans import Lengths, Spans, image_and_text, spans_of

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.op import Op
    from trainer.attention.sites import Site


class SiteCall:
    """Which layer runs, under which step context, and what the stages of an op share meanwhile.

    It is made anew whenever the layer runs, also when gradient checkpointing runs it a second time,
    and is gone afterwards: an op that keeps a tensor here, not on itself, holds no memory between
    layers and never meets the tensor of another layer or step. The `block` stage runs after the
    layer and gets a call of its own.
    """

    def __init__(self, site: Site, ctx: StepContext, lengths: Lengths | None = None) -> None:
        self.site, self.ctx = site, ctx
        self.lengths = lengths
        # a few layers compute several softmax attentions in one run, such as over text and over a
        # picture: the number of the one that runs, 0 for the first, -1 before it
        self.part = 0
        # what q k^T is multiplied with, as the layer calls it; None: head_dim ** -0.5
        self.scale = site.scale
        self._scratch: dict[str, dict[str, Any]] = {}

    def scratch(self, op: Op) -> dict[str, Any]:
        """What this op has kept in earlier stages of this run; empty at first."""
        return self._scratch.setdefault(op.name, {})

    def spans(self, tokens: int, keys: bool = False) -> Spans:
        """Where the image and the text lie in a sequence of so many queries, or keys.

        Raises:
            ValueError: that is not known at this site; the message says why.
        """
        if self.part > 0 or (self.site.kind == "cross" and keys and self.site.has("add_k")):
            raise ValueError(
                f"{self.site.name!r} attends several times in one run, and which of the keys are "
                "text is not known; choose other sites"
            )
        return spans_of(tokens, site=self.site, ctx=self.ctx, lengths=self.lengths, keys=keys)

    def grid(self, tokens: int, who: str) -> tuple[int, int]:
        """Height and width of the grid of the layer's image tokens; ValueError as `token_grid`, or
        where these tokens are not those of the image alone."""
        site = self.site
        if site.kind == "joint":
            image = -1
            if self.lengths is not None:
                image, _ = image_and_text(site, self.ctx, self.lengths)
            if tokens != image:
                raise ValueError(
                    f"{who} needs a grid of image tokens, and {site.name!r} has text in the same "
                    "sequence; choose sites of self-attention"
                )
        elif site.text_alone:
            raise ValueError(
                f"{who} needs a grid of image tokens, and {site.name!r} sees the text alone; "
                "choose other sites"
            )
        return token_grid(tokens, site=site, ctx=self.ctx, who=who)
