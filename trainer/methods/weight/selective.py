"""Selective training: chosen projections of chosen attention sites train, and nothing else.

Custom Diffusion (CVPR 2023, arXiv 2212.04488, section 3.2) trains K and V of cross-attention: the
only weights that read the text, W_k c and W_v c, 2 % of a U-Net. Its first context token (BOS), the
same in every caption, is detached.

Where image and text share a sequence, K and V of the text are layers of their own (`add_k`,
`add_v`); where one layer reads both, the text gets a change of its own, which starts at zero:

    k_i = W_k x_i + dW_k x_i    for the tokens i of the text, W_k x_i for those of the image
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

OF_TEXT: dict[Role, Role] = {"k": "add_k", "v": "add_v"}  # where the text has layers of its own


class Selective(Method):
    """Which projections of which sites train."""

    kind: ClassVar[EditKind] = "select"
    systems: ClassVar[str] = "Custom Diffusion"
    paper: ClassVar[str] = "arXiv 2212.04488"

    sites: SiteSelector | None = Field(
        None,
        description="attention that trains; null for all that reads the text, cross-attention and "
        f"the text's own layers of joint attention: {SELECTOR}",
    )
    projections: tuple[Role, ...] = Field(
        ("k", "v"),
        min_length=1,
        description="which of its layers: query, key, value, output (keys and values in the "
        "paper); add_k and add_v are those of text in joint attention, which sites=null takes by "
        "itself",
    )
    detach_first_token: bool = Field(
        False,
        description="in cross-attention, no gradient through the first token of the text, the same "
        "in every caption, as in the paper",
    )

    @property
    def linear(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require

        if self.sites is None:
            sites = _reading_text(model.sites)
        else:
            sites = require(model.sites, self.sites, "sites")
        self._detach(model, sites)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trains: list[str] = []
        for site in sites:
            roles = self._roles(site)
            shared = _shared(site, roles)
            trains += _span_of_text(model, site, shared)
            layers = [site.projection(role) for role in roles if role not in shared]
            trains += [names[id(value)] for layer in layers for value in layer.parameters()]
        return Edit(
            sites=tuple(site.name for site in sites),
            claims=tuple((name, "weight") for name in trains),
            trains=tuple(trains),
        )

    def _roles(self, site: Site) -> list[Role]:
        """The layers that train at a site: of K and V, where no sites were chosen, those of the
        text.

        Raises:
            ValueError: other layers are named, and no site.
        """
        if self.sites is None and site.kind == "cross":
            if not all(site.has(role) for role in self.projections if role in OF_TEXT.values()):
                raise ValueError(
                    f"{site.name} is cross-attention, whose keys and values read the text alone "
                    "and are called k and v; give projections=[k,v]"
                )
            return list(self.projections)
        if self.sites is not None:
            return list(self.projections)
        own = site.has("add_k")
        roles = [OF_TEXT.get(role, role) if own else role for role in self.projections]
        if other := [role for role in roles if role not in (*OF_TEXT, *OF_TEXT.values())]:
            raise ValueError(
                f"projections={','.join(other)} of {site.name} do not read the text alone; say "
                "which sites train, as in sites=joint"
            )
        return roles

    def _detach(self, model: AttentionModel, sites: Sequence[Site]) -> None:
        from trainer.ops.detach_first_token import DetachFirstToken

        cross = [site for site in sites if site.kind == "cross"]
        if not self.detach_first_token or (self.sites is None and not cross):
            return
        if not cross:
            raise ValueError(
                "detach_first_token needs cross-attention, and sites selects none; set it to false"
            )
        model.host.install(DetachFirstToken(), cross)


def _reading_text(sites: Sequence[Site]) -> list[Site]:
    """Where the image reads the text: cross-attention, and joint attention in which the text has
    layers of its own; where there is neither, joint attention in which both have the same.

    Raises:
        ValueError: the model reads no text.
    """
    joint = [site for site in sites if site.kind == "joint"]
    own = [site for site in sites if site.kind == "cross" or (site in joint and site.has("add_k"))]
    if not (own or joint):
        kinds = ", ".join(sorted({site.kind for site in sites}))
        raise ValueError(
            f"no attention of this model reads a text, it has {kinds} alone; say which sites "
            "train, as in sites=self"
        )
    return own or joint


def _shared(site: Site, roles: Sequence[Role]) -> list[Role]:
    """The layers of these that read image and text by the same weights.

    Raises:
        ValueError: one of them reads the image alone, or makes queries too.
    """
    read: list[Role] = [role for role in roles if role in ("k", "v", "qkv")]
    if site.kind != "joint" or not read:
        return []
    if site.has("add_k"):
        raise ValueError(
            f"{', '.join(read)} of {site.name} read the image, and keys and values of the text "
            "come from layers of their own; give projections=[add_k,add_v], or sites=null, which "
            "takes these"
        )
    if "qkv" in read:
        raise ValueError(
            f"qkv of {site.name} makes queries, keys and values of image and text by the same "
            "weights, so training it would change all of them; choose sites where text has layers "
            "of its own, or train the rest by lora"
        )
    return read


def _span_of_text(model: AttentionModel, site: Site, roles: Sequence[Role]) -> list[str]:
    """Gives the text of a site a change of its own in these layers; the names of its
    parameters."""
    from trainer.ops.selective import TextSpan

    if not roles:
        return []
    span = TextSpan({role: site.projection(role) for role in roles})
    model.host.install(span, [site])
    path = f"{model.denoiser_name}.{site.name}.{span.name}"
    return [f"{path}.{name}" for name, _ in span.named_parameters()]
