"""FlashMask: attention under a mask of column intervals, whose hidden tiles are never computed.

Wang et al., arXiv 2410.01359: each key is hidden from at most two runs of queries, four numbers a
key in place of a row of the mask. Masks by blocks of the grid (sliding tiles, circles, radial) are
none of these: the blocks of keys that a block of queries sees are gathered. Tokens count in the
order of the site, row by row for an image, frame by frame for a clip in one sequence.

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
    from trainer.kernels.block_masks import BlockMask
    from trainer.kernels.mask_spec import MaskSpec


# masks by blocks of the grid, and whether the tokens of all frames are needed in one sequence
BY_BLOCKS = {"sliding_tiles": False, "circle": False, "radial": True}
RADIAL_BLOCK = 128


class Flashmask(Method):
    """Which tokens see each other. It trains nothing by itself."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "FlashMask, Sliding Tile Attention, CLEAR, Radial Attention"
    paper: ClassVar[str] = "arXiv 2410.01359, 2502.04507, 2412.16112, 2506.19852"

    sites: SiteSelector = Field("self", description=f"attention that is masked: {SELECTOR}")
    mask: Literal[
        "sliding_window",
        "windows",
        "causal",
        "frames",
        "causal_frames",
        "sliding_tiles",
        "circle",
        "radial",
    ] = Field(
        "sliding_window",
        description="which tokens see each other: those near (sliding_window), of one block of the "
        "sequence (windows), earlier ones (causal); with the frames of a clip in one sequence, the "
        "first and the previous frame (frames) or all earlier ones (causal_frames); by blocks of "
        "the grid, the tiles around (sliding_tiles), those in a circle (circle, CLEAR), or in a "
        "clip the nearer the fewer frames lie between (radial)",
    )
    size: float = Field(
        0.125,
        gt=0,
        description="tokens a window reaches to either side where it slides, all its tokens in "
        "windows; up to 1 a share of all tokens, above it their number. Of circle the radius, of "
        "radial the reach inside neighbouring frames: a share of the grid's longer edge, or of a "
        "frame's tokens, or in tokens",
    )
    tile: int = Field(
        8, gt=0, description="with sliding_tiles and circle: tokens along the edge of a tile"
    )
    reach: int = Field(
        1, ge=0, description="with sliding_tiles: tiles that a tile sees in every direction"
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
        found = {}
        if self.mask not in ("sliding_window", "windows", "circle", "radial"):
            found["size"] = (
                f"mask is {self.mask}; it is for sliding_window, windows, circle and radial"
            )
        if self.mask not in ("sliding_tiles", "circle"):
            found["tile"] = f"mask is {self.mask}; it is for sliding_tiles and circle"
        if self.mask != "sliding_tiles":
            found["reach"] = f"mask is {self.mask}; it is for sliding_tiles"
        if self.mask in BY_BLOCKS:
            found["backend"] = f"mask is {self.mask}, which has one; it is for the other masks"
        return found

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.flashmask import BlockMasked
        from trainer.ops.flashmask import FlashMask as Op

        chosen = require(model.sites, self.sites, "sites")
        for site in chosen:
            if site.kind in ("cross", "joint"):
                raise ValueError(
                    f"{site.name} is {site.kind}-attention, whose keys have text; choose sites=self"
                )
        if self.mask in BY_BLOCKS:
            return installed(model, BlockMasked(self.blocks, BY_BLOCKS[self.mask]), chosen)
        return installed(
            model, Op(self.spec, None if self.backend == "auto" else self.backend), chosen
        )

    def blocks(self, grid: tuple[int, int], frames: int) -> BlockMask:
        """The mask by blocks of a grid of tokens, in a clip of so many frames in one sequence."""
        from trainer.kernels import block_masks
        from trainer.kernels.soft_merging import Tiling

        tokens = grid[0] * grid[1]
        if self.mask == "radial":
            width = self.size * tokens if self.size <= 1 else self.size
            size = max(n for n in range(1, RADIAL_BLOCK + 1) if tokens % n == 0)
            return block_masks.radial(frames, tokens, width, size=size)
        tile = Tiling.of(grid, self.tile).tile
        if self.mask == "sliding_tiles":
            return block_masks.sliding_tiles(grid, tile, self.reach)
        return block_masks.circle(
            grid, tile, self.size * max(grid) if self.size <= 1 else self.size
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
