"""Full training: every parameter of the denoiser trains, and of the text encoders if asked.

theta <- theta - lr * grad, for all theta: the reference that smaller methods are compared with.
What another method has installed at the sites, or inserted and trains, trains as that method says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Full(Method):
    """Which networks train."""

    kind: ClassVar[EditKind] = "select"
    systems: ClassVar[str] = "Full fine-tuning"
    paper: ClassVar[str] = ""

    denoiser: bool = Field(True, description="train the denoiser")
    text_encoder: bool = Field(False, description="train the text encoders")

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.model import check_reads_text

        parts: list[str] = [model.denoiser_name] if self.denoiser else []
        if self.text_encoder:
            check_reads_text(model)
            parts += list(model.text_encoders)
        others = _of_others(model) if self.denoiser else set()
        trains = [
            name
            for name, parameter in model.named_parameters()
            if name.split(".")[0] in parts and id(parameter) not in others
        ]
        if not trains:
            raise ValueError(
                "denoiser and text_encoder are both false, so it trains nothing; set one to true"
            )
        return Edit(
            sites=tuple(site.name for site in model.sites) if self.denoiser else (),
            claims=tuple((name, "weight") for name in trains),
            trains=tuple(trains),
        )


def _of_others(model: AttentionModel) -> set[int]:
    """The parameters of ops at the sites, and of inserted blocks that train already."""
    from torch import nn

    from trainer.attention.insertion import insertions

    ops = [op for processor in model.host.processors.values() for op in processor.ops]
    modules: list[nn.Module] = [op for op in ops if isinstance(op, nn.Module)]
    modules += [found.block for found in insertions(model.denoiser) if found.trains]
    return {id(parameter) for module in modules for parameter in module.parameters()}
