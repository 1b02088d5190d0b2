"""AT-EDM: tokens that no important token attends to are left out of the blocks that follow, and
recovered before the grid is needed again.

    s <- A^T s / sum    importance of the tokens by the map A of the first block's self-attention
    y_pruned = y_donor  donor: the kept token that the pruned one attends to the most

Wang et al., CVPR 2024, arXiv 2405.05252. Tokens are dropped after the feed-forward layer of the
first block of each stack of transformer blocks and copied back after the last; a stack of one
block, as all of Stable Diffusion 1.5's, saves nothing and is left. In the first steps of sampling
the first stack of every stage drops nothing (the denoising-steps-aware schedule). The share of
tokens that the paper drops could not be established. The map is averaged over heads before it is
ranked by, and has every `stride`-th row, so that attention keeps its fused kernel. It trains
nothing:

    python -m trainer sample backbone=tiny_dit 'methods.at_edm={ratio: 0.5}' prompt="a fox"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.merging import TOKENS
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class AtEdm(Method):
    """How many tokens are dropped, where, and from which step on."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "AT-EDM"
    paper: ClassVar[str] = "arXiv 2405.05252"

    sites: SiteSelector = Field(
        "self", description=f"attention whose stacks drop tokens: {SELECTOR}"
    )
    ratio: float = Field(0.5, ge=0, lt=1, description="share of the tokens that are dropped")
    dense: float = Field(
        0.3,
        ge=0,
        le=1,
        description="part of a sampler's steps, the first ones, in which the first stack of every "
        "stage drops nothing (15 of 50 in the paper)",
    )
    stride: int = Field(4, gt=0, description="of the map's rows, every so many-th is computed")
    iterations: int = Field(5, gt=0, description="of the page rank")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import unet_block
        from trainer.ops.reduction.at_edm import TokenPruning
        from trainer.ops.reduction.stacks import blocks_around, stacks_of

        stacks = stacks_of(model, self.sites, "it")
        firsts = {unet_block(name): name for name in reversed(stacks)}
        op = TokenPruning(
            {name: (sites[0].name, sites[-1].name) for name, sites in stacks.items()},
            set(firsts.values()),
            ratio=self.ratio,
            dense=self.dense,
            stride=self.stride,
            iterations=self.iterations,
        )
        inside = [site for name in stacks for site in blocks_around(model, name)]
        model.host.install(op, inside)
        return Edit(
            tuple(site.name for site in inside),
            claims=tuple((f"{model.denoiser_name}.{site.name}", TOKENS) for site in inside),
        )
