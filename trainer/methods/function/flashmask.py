"""FlashMask: attention under a mask of column intervals, whose hidden tiles are never computed.

Wang et al., arXiv 2410.01359: each key is hidden from at most two runs of queries, four numbers a
key in place of a row of the mask. Tokens count in the order of the site, row by row for an image,
frame by frame for a clip in one sequence.

    python -m trainer fit recipe=lora 'methods.flashmask={}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.kernel import installed
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.kernels.mask_spec import MaskSpec


class Flashmask(Method):
    """Which tokens see each other. It trains nothing by itself."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "FlashMask"
    paper: ClassVar[str] = "arXiv 2410.01359"

    sites: SiteSelector = Field("self", description=f"attention that is masked: {SELECTOR}")
    mask: Literal["sliding_window", "windows", "causal", "frames", "causal_frames"] = Field(
        "sliding_window",
        description="which tokens see each other: those near (sliding_window), of one block of the "
        "sequence (windows), earlier ones (causal); with the frames of a clip in one sequence, the "
        "first and the previous frame (frames) or all earlier ones (causal_frames)",
    )
    size: float = Field(
        0.125,
        gt=0,
        description="tokens a window reaches to either side where it slides, all its tokens in "
        "windows; up to 1 a share of all tokens, above it their number",
    )
    seen: int = Field(
        0, ge=0, description="with sliding_window: first tokens that see all and are seen by all"
    )
    backend: Literal["auto", "blockwise", "flex", "dense"] = Field(
        "auto",
        description="blockwise on any device, flex on CUDA, dense where tokens are few; auto is "
        "the fastest there is",
    )

    @field_validator("size")
    @classmethod
    def _share_or_number(cls, size: float) -> float:
        if size > 1 and size != int(size):
            raise ValueError("give a share of at most 1, or a whole number of tokens")
        return size

    @model_validator(mode="after")
    def _seen_by_a_window(self) -> Flashmask:
        if self.seen and self.mask != "sliding_window":
            raise ValueError(f"seen={self.seen} belongs to mask=sliding_window; leave it at 0")
        return self

    def idle(self) -> dict[str, str]:
        if self.mask in ("sliding_window", "windows"):
            return {}
        return {"size": f"mask is {self.mask}; it is for sliding_window and windows"}

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.flashmask import FlashMask as Op

        chosen = require(model.sites, self.sites, "sites")
        for site in chosen:
            if site.kind in ("cross", "joint"):
                raise ValueError(
                    f"{site.name} is {site.kind}-attention, whose keys have text; choose sites=self"
                )
        return installed(
            model, Op(self.spec, None if self.backend == "auto" else self.backend), chosen
        )

    def spec(self, tokens: int, frames: int) -> MaskSpec:
        """The mask of this many tokens, `frames` frames of them.

        Raises:
            ValueError: the tokens do not divide into the frames.
        """
        from trainer.kernels import column_masks
        from trainer.kernels.column_masks import causal_mask

        width = max(1, round(self.size * tokens if self.size <= 1 else self.size))
        if self.mask == "causal":
            return causal_mask(tokens)
        if self.mask == "windows":
            return column_masks.windows(tokens, width)
        if self.mask == "sliding_window":
            return column_masks.global_sliding_window(tokens, self.seen, before=width, after=width)
        if tokens % frames:
            raise ValueError(
                f"methods.flashmask: mask={self.mask} needs the tokens of all frames in one "
                f"sequence, and {tokens} tokens are no multiple of {frames} frames"
            )
        sees = column_masks.sparse_causal(frames)
        if self.mask == "causal_frames":
            sees = [list(range(frame + 1)) for frame in range(frames)]
        return column_masks.frames(tokens // frames, sees)
