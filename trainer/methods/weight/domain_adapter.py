"""The domain adapter of AnimateDiff: a LoRA on the attention of the image model fits the look of
the frames of a set of clips, so that motion modules trained over it need not learn that look; it is
scaled down or removed while sampling.

    q = W_q z + scale B A z    and so k, v and the output; scale is 1 in training, any in sampling

Guo et al., ICLR 2024, arXiv 2307.04725, section 4.1 and equation 4: on self- and cross-attention,
trained on single frames at random moments with the objective of the image model. The motion modules
then train over it, frozen at scale 1:

    python -m trainer fit recipe=domain_adapter run.id=look
    python -m trainer fit recipe=animatediff methods.domain_adapter={} optim.lrs.domain_adapter=0 \\
        run.start_from=runs/domain_adapter/look run.id=moving
    python -m trainer sample adapter=runs/animatediff/moving scale.domain_adapter=0 prompt="a fox"
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import LowRank, Rank, Sites, edit_of

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class DomainAdapter(LowRank):
    """Options of low rank, on the attention of the image model."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "AnimateDiff's domain adapter"
    paper: ClassVar[str] = "arXiv 2307.04725"

    sites: Sites = "self | cross | joint"
    rank: Rank = 16

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.adapters.inject import inject, sites_of

        targets = self.targets(model)
        chosen = sites_of(targets)
        through_time = [s.name for s in model.sites if s.kind == "temporal" and s.name in chosen]
        if through_time:
            raise ValueError(
                f"{through_time[0]} is attention over frames, and a domain adapter fits single "
                "frames; choose sites of the image model, as in sites='self | cross'"
            )
        config = partial(self.config, init_lora_weights=True)
        return edit_of(targets, inject(model, targets, config, owner=self.name))
