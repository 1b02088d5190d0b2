"""Selective training: chosen projections of chosen attention sites train, and nothing else.

Custom Diffusion (CVPR 2023, arXiv 2212.04488, section 3.2) trains K and V of cross-attention: the
only weights that read the text, W_k c and W_v c, 2 % of a U-Net. Its first context token (BOS), the
same in every caption, is detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.attention.projections import Role
from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class Selective(Method):
    """Which projections of which sites train."""

    kind: ClassVar[EditKind] = "select"
    systems: ClassVar[str] = "Custom Diffusion"
    paper: ClassVar[str] = "arXiv 2212.04488"

    sites: SiteSelector = Field("cross", description=f"attention that trains: {SELECTOR}")
    projections: tuple[Role, ...] = Field(
        ("k", "v"),
        min_length=1,
        description="which of its layers: query, key, value, output (keys and values in the "
        "paper); add_k and add_v are those of text in joint attention",
    )
    detach_first_token: bool = Field(
        False,
        description="no gradient through the first token of the text, the same in every caption, "
        "as in the paper",
    )

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.detach_first_token import DetachFirstToken

        sites = require(model.sites, self.sites, "sites")
        if self.detach_first_token:
            cross = [site for site in sites if site.kind == "cross"]
            if not cross:
                raise ValueError(
                    "detach_first_token needs cross-attention, and sites selects none; set it to "
                    "false"
                )
            model.host.install(DetachFirstToken(), cross)
        for site in sites:
            _refuse_shared(site, self.projections)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trains = [
            names[id(parameter)]
            for site in sites
            for role in self.projections
            for parameter in site.projection(role).parameters()
        ]
        return Edit(
            sites=tuple(site.name for site in sites),
            claims=tuple((name, "weight") for name in trains),
            trains=tuple(trains),
        )


def _refuse_shared(site: Site, roles: Sequence[Role]) -> None:
    """Refuses keys and values that are not the text's at a site of joint attention."""
    read = [role for role in roles if role in ("k", "v", "qkv")]
    if site.kind != "joint" or not read:
        return
    if site.has("add_k"):
        raise ValueError(
            f"{', '.join(read)} of {site.name} read the image, and keys and values of the text "
            "come from layers of their own; give projections=[add_k,add_v]"
        )
    raise ValueError(
        f"{', '.join(read)} of {site.name} read image and text by the same weights, so training "
        "them would change both; choose sites where text has layers of its own, or train the rest "
        "by lora"
    )
