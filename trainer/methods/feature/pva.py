"""PVA: parallel visual attention, with queries, keys and values of its own for reference pictures,
under one softmax with those of the text.

    O = softmax([Q_t K_t^T, Q_v K_v^T] / sqrt(d)) [V_t; V_v]

Xu et al., arXiv 2312.03556, section 3.2. Tokens of a picture are made by a trained transformer of
learned queries over what a frozen encoder sees: the paper's sees faces, here it is any CLIP or
DINO. Like the paper's, the new layers begin as copies of the text's. Without a reference picture
the model is its base, bit for bit.

    python -m trainer fit recipe=pva
    python -m trainer sample adapter=runs/pva/<id> reference=photo.png \\
        prompt="an object on a red background"

To personalise it further for one's own few photos, in 40 steps as in the paper, train on from that
run with the transformer as it is:

    python -m trainer fit recipe=pva run.start_from=runs/pva/<id> \\
        methods.pva.personalise=true run.steps=40 data.source=folder data.folder=./pictures \\
        data.reference=null data.unnamed=null data.count=null

The paper inpaints faces with a model for inpainting; that backbone is not among those known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class Pva(Method):
    """The encoder, the transformer that makes tokens, and where they are attended to."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "PVA"
    paper: ClassVar[str] = "arXiv 2312.03556"

    encoder: str = Field(
        "tiny",
        description="the frozen encoder of pictures: the folder of a CLIP or a DINO in "
        "transformers layout, or tiny, the CLIP that ships",
    )
    count: int = Field(10, gt=0, description="tokens of a picture")
    depth: int = Field(4, gt=0, description="blocks of the transformer")
    heads: int = Field(4, gt=0, description="heads of its attention, 64 wide each")
    inner: int | None = Field(
        None, gt=0, description="width of its blocks; null for that of the tokens attention reads"
    )
    sites: SiteSelector = Field(
        "cross", description=f"the cross-attention that reads the pictures: {SELECTOR}"
    )
    dropout: float = Field(
        0.05, ge=0, lt=1, description="share of training samples that see no picture"
    )
    personalise: bool = Field(
        False, description="the transformer stays as it is, and the attention alone trains"
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.extras import register_extra
        from trainer.attention.further_conditions import FurtherCondition, register_condition
        from trainer.backbones.image_encoder import open_encoder
        from trainer.data.references import REFERENCE
        from trainer.ops import pva as ops
        from trainer.ops.branches.projectors import Resampler

        sites = self._chosen(model)
        width = sites[0].projection("k").in_features
        encoder = open_encoder(self.encoder)
        condition = FurtherCondition(
            self.name, self.name, (REFERENCE,), encode=ops.encode_visual, dropout=self.dropout
        )
        register_condition(model, condition)
        register_extra(model, ops.ENCODER, encoder, owner=self.name)
        made = Resampler(
            encoder.token_width,
            width=width,
            count=self.count,
            inner=self.inner or width,
            depth=self.depth,
            heads=self.heads,
        )
        shared = register_extra(model, ops.PROJECTOR, made, owner=self.name)
        own = [name for site in sites for name in self._installed(model, site)]
        return Edit(
            sites=tuple(site.name for site in sites),
            claims=tuple((name, "weight") for name in (*shared, *own)),
            trains=tuple(own) if self.personalise else (*shared, *own),
            keeps=shared if self.personalise else (),
        )

    def _chosen(self, model: AttentionModel) -> list[Site]:
        """Raises ValueError for sites that are not cross-attention to tokens of one width."""
        from trainer.attention.sites import require

        sites = require(model.sites, self.sites, "sites")
        if other := [site for site in sites if site.kind != "cross"]:
            raise ValueError(
                f"sites: {other[0].name} is {other[0].kind} attention, whose queries are not those "
                "of a picture to its text; select cross-attention, as in sites=cross"
            )
        widths = {site.projection("k").in_features for site in sites}
        if len(widths) > 1:
            raise ValueError(
                f"sites: they read tokens of the widths {sorted(widths)}; select sites of one width"
            )
        return sites

    def _installed(self, model: AttentionModel, site: Site) -> list[str]:
        """The names of the parameters of one site, whose op is installed there."""
        from trainer.backbones.four_bits import unpacked
        from trainer.ops.pva import VisualAttention

        layers = {role: unpacked(site.projection(role)) for role in ("q", "k", "v")}
        op = VisualAttention(layers, site.heads)
        model.host.install(op, [site])
        path = f"{model.denoiser_name}.{site.name}.{op.name}"
        return [f"{path}.{name}" for name, _ in op.named_parameters()]
