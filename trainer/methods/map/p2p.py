"""Prompt-to-Prompt: a picture is edited by its prompt, with the attention maps of the source, so
that all else stays in its place.

    A <- A_source R    in cross-attention, for the words that both prompts have or that take the
                       place of others; in self-attention of small grids A <- A_source

Hertz et al., ICLR 2023, arXiv 2208.01626. Source and edit are generated together, from the same
noise, or from the noise that inversion finds for a clip (`source=`), whose reconstruction under
guidance is optimised then (Null-text inversion, Mokady et al., CVPR 2023, arXiv 2211.09794). It has
nothing to train:

    python -m trainer sample backbone=tiny 'methods.p2p={source: "a fox on a red background"}' \\
        prompt="a cat on a red background"
    python -m trainer sample backbone=tiny methods.p2p.edit=refine methods.p2p.blend=true \\
        source_prompt="a fox" prompt="a fox and a cat"

Factors on the maps of words do not keep their sum at 1, as in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import Editing
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class P2P(Editing):
    """The source, and how far its attention maps are the edit's."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "Prompt-to-Prompt (P2P), Null-text Inversion"
    paper: ClassVar[str] = "arXiv 2208.01626, 2211.09794"

    source: str | None = Field(
        None, description="the source's prompt; null takes the source_prompt of the sampling"
    )
    sites: SiteSelector = Field(
        "self | cross", description=f"the attention whose maps are the source's: {SELECTOR}"
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.p2p import mapped_sites

        chosen = mapped_sites(model.sites, self.sites)
        hook = self.edits(self.source, needed=True, sites=self.sites)
        return Edit(tuple(site.name for site in chosen), sampling=(hook,))
