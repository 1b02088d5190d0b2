"""C-LoRA: concepts are learned one after another, each by a LoRA of its own that is kept off the
weights that earlier ones changed.

    W_t = W_0 + sum_{t' < t} A_t' B_t' + A_t B_t
    L = L_diffusion + lambda * sum over layers of |  |sum_{t' < t} A_t' B_t'| (.) A_t B_t  |_F^2

Smith et al., Continual Diffusion, arXiv 2304.06027, section 3; on K and V of cross-attention. The
first concept has no penalty. The paper's prompts have a new token with a random start for every
concept and no class word; that is `new_token` with `init: null` and data without `class_word`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import LowRank, Projections, Rank, Sites, edit_of
from trainer.methods.shared.options import TaskNumber

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.model import AttentionModel


class CLora(LowRank):
    """Which concept trains, and how strongly it is kept off the earlier ones."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "C-LoRA (Continual Diffusion)"
    paper: ClassVar[str] = "arXiv 2304.06027"

    rank: Rank = 16
    sites: Sites = "cross"
    projections: Projections = ("k", "v")
    task: TaskNumber = 0
    penalty: float = Field(
        1e6,
        ge=0,
        description="lambda; it weighs a fourth power of weight changes, so it is a large number, "
        "and another one for another rank, learning rate or backbone",
    )

    def idle(self) -> dict[str, str]:
        own = {} if self.task else {"penalty": "task=0 has no earlier concept to be kept off"}
        return super().idle() | own

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.adapters.inject import layer_of, stack

        targets = self.targets(model)
        *past, trains = stack(model, targets, self.config, owner=self.name, count=self.task + 1)
        keeps = [name for names in past for name in names]
        layers = [layer_of(model, target) for target in targets]
        loss = self._penalty(layers) if past and self.penalty else None
        return edit_of(targets, trains, keeps, loss=loss)

    def _penalty(self, layers: list[Any]) -> Callable[[object], Tensor]:
        def penalty(step: object) -> Tensor:
            import torch

            return self.penalty * torch.stack([_overlap(layer) for layer in layers]).sum()

        return penalty


def _overlap(layer: Any) -> Tensor:
    """|  |sum_{t' < t} A_t' B_t'| (.) A_t B_t  |_F^2 of one layer."""
    import torch

    *past, own = layer.active_adapters
    with torch.no_grad():
        changed = sum(layer.get_delta_weight(name) for name in past).abs()
    overlap: Tensor = (changed * layer.get_delta_weight(own)).float().square().sum()
    return overlap
