"""IP-Adapter: cross-attention of its own to reference pictures, beside that to the text.

    O = Attn(Q, K_text, V_text) + scale * Attn(Q, c W_k, c W_v),   W_k, W_v from those of the text

Ye et al., arXiv 2308.06721, equation 5. c are tokens that a trained projector makes of what a
frozen encoder sees: of the picture as a whole (`pooled`, 4 tokens), or of all its patches by a
resampler (as in the released IP-Adapter Plus). Backbones with joint attention have two forms, see
`trainer/ops/ip_adapter.py`. What trains is the projector, W_k and W_v.

    python -m trainer fit recipe=ip_adapter
    python -m trainer sample adapter=runs/ip_adapter/<id> reference=photo.png \\
        prompt="an object on a red background" reference_scale=0.8

Without a reference picture the model is its base, bit for bit, and at reference_scale=0 too. As in
the released code, a share of training samples sees no picture, which is told as one of zeros, and
guidance then compares with that. That code drops text, picture or both, each in 5 % of the samples;
here the two are dropped independently, the text by objective.caption_dropout. The published
adapters for Stable Diffusion 3 have a norm of the tokens beside, which depends on the timestep, and
those for FLUX add after the whole block; both are left out, and their files are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site
    from trainer.ops.branches.ip_layout import ProjectorShape


class IpAdapter(Method):
    """The encoder, the projector, and where pictures are attended to."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "IP-Adapter"
    paper: ClassVar[str] = "arXiv 2308.06721"
    when_sampling: ClassVar[frozenset[str]] = frozenset(("scale", "scales"))

    encoder: str = Field(
        "tiny",
        description="the frozen encoder of pictures: the folder of a CLIP or a DINO in "
        "transformers layout, or tiny, the CLIP that ships",
    )
    form: Literal["pooled", "resampler"] = Field(
        "pooled",
        description="what tokens are made of: the picture as a whole, or all its patches, by a "
        "resampler as in IP-Adapter Plus",
    )
    count: int | None = Field(
        None, gt=0, description="tokens of a picture; null for 4, of the resampler for 16"
    )
    depth: int = Field(4, ge=1, le=4, description="blocks of the resampler; other tools read 4")
    heads: int = Field(12, gt=0, description="heads of its attention, 64 wide each")
    inner: int | None = Field(
        None, gt=0, description="width of its blocks; null for that of the tokens attention reads"
    )
    sites: SiteSelector = Field(
        "cross | joint", description=f"the attention that reads the pictures: {SELECTOR}"
    )
    joint: Literal["concatenated", "added"] = Field(
        "concatenated",
        description="where text and image share a sequence: the image's queries attend to the "
        "image's keys and the picture's together (Stable Diffusion 3), or to the picture's alone, "
        "added after the output projection (FLUX)",
    )
    scale: float = Field(1.0, ge=0, description="strength while sampling; training has 1")
    scales: dict[SiteSelector, float] = Field(
        default_factory=dict,
        description="strength at some sites, times scale, as in {up: 1, down | mid: 0}; the last "
        "that selects a site counts",
    )
    dropout: float = Field(
        0.05, ge=0, lt=1, description="share of training samples that see no picture"
    )
    weights: str | None = Field(
        None,
        description="a file to start from that load_ip_adapter of diffusers reads, which says "
        "form, count, depth, heads and inner; null starts from the keys and values of the text",
    )
    train: bool = Field(True, description="whether it trains; without, weights is used as it is")

    def idle(self) -> dict[str, str]:
        shape = ("form", "count", "depth", "heads", "inner")
        if self.weights is not None:
            found = dict.fromkeys(shape, "the file of weights says it; it is for a new adapter")
        elif self.form == "pooled":
            why = "form=pooled has no blocks; it is for form=resampler"
            found = dict.fromkeys(("depth", "heads", "inner"), why)
        else:
            found = {}
        return found if self.train else found | {"dropout": "nothing trains (train=false)"}

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.extras import register_extra
        from trainer.attention.further_conditions import FurtherCondition, register_condition
        from trainer.backbones.image_encoder import open_encoder
        from trainer.data.references import REFERENCE
        from trainer.ops import ip_adapter as ops

        sites = self._chosen(model)
        width = _width_of(sites)
        encoder = open_encoder(self.encoder)
        stored = self._stored()
        shape = self._shape(width, stored)
        reads = (REFERENCE, ops.MASKS, ops.STRENGTH)
        condition = FurtherCondition(
            self.name, self.name, reads, encode=ops.encode_pictures, dropout=self.dropout
        )
        register_condition(model, condition)
        register_extra(model, ops.ENCODER, encoder, owner=self.name)
        projector = shape.make(encoder, width)
        names = list(register_extra(model, ops.PROJECTOR, projector, owner=self.name))
        keys = {site.name: self._installed(model, site) for site in sites}
        for name, own in keys.items():
            path = f"{model.denoiser_name}.{name}.{ops.NAME}.image"
            names += [f"{path}.{inner}" for inner, _ in own.named_parameters()]
        if stored is not None:
            self._load(model, stored, projector, keys=keys)
        return Edit(
            sites=tuple(site.name for site in sites),
            claims=tuple((name, "weight") for name in names),
            trains=tuple(names) if self.train else (),
            keeps=() if self.train else tuple(names),
        )

    def _chosen(self, model: AttentionModel) -> list[Site]:
        from trainer.attention.sites import require, select

        sites = require(model.sites, self.sites, "sites")
        if other := [site for site in sites if site.kind not in ("cross", "joint")]:
            raise ValueError(
                f"sites: {other[0].name} is {other[0].kind} attention, which reads no text to see "
                "pictures beside; select cross or joint attention"
            )
        for selector in self.scales:
            if not select(sites, selector):
                raise ValueError(f"scales: {selector!r} selects none of the sites it acts on")
        return sites

    def _stored(self) -> dict[str, Any] | None:
        from trainer.ops.branches.ip_layout import read_layout

        if self.weights is None and not self.train:
            raise ValueError(
                "train=false without weights would see nothing in a picture; name a trained file, "
                "as in weights=ip-adapter_sd15.safetensors"
            )
        return None if self.weights is None else read_layout(self.weights)

    def _shape(self, width: int, stored: Mapping[str, Any] | None) -> ProjectorShape:
        from trainer.ops.branches.ip_layout import COUNT, ProjectorShape, shape_in

        if stored is not None:
            return shape_in(stored, width, str(self.weights))
        pooled = self.form == "pooled"
        count = self.count or (COUNT if pooled else 16)
        inner = self.inner or width
        return ProjectorShape(pooled, count, inner=inner, depth=self.depth, heads=self.heads)

    def _installed(self, model: AttentionModel, site: Site) -> Any:
        """The keys and values of one site, whose op is installed there."""
        from trainer.attention.sites import select
        from trainer.backbones.four_bits import unpacked
        from trainer.ops.ip_adapter import ImageBranch, ImageKeys, JointBranch, LateBranch

        scale = self.scale
        for selector, factor in self.scales.items():
            if select([site], selector):
                scale = self.scale * factor
        joint = site.kind == "joint"
        together = joint and self.joint == "concatenated"
        k, v = (
            unpacked(site.projection(role)).get_parameter("weight") for role in _text_roles(site)
        )
        image = ImageKeys(k, v, heads=site.heads, scale=scale, normed=together)
        kinds = {"concatenated": JointBranch, "added": LateBranch}
        op: Any = kinds[self.joint](image) if joint else ImageBranch(image)
        model.host.install(op, [site])
        return image

    def _load(
        self, model: AttentionModel, stored: Mapping[str, Any], projector: Any, *, keys: Any
    ) -> None:
        from trainer.ops.branches.ip_layout import load_layout, sites_by_number

        if any(site.kind == "joint" for site in model.sites):
            raise ValueError(
                f"weights={self.weights}: files for backbones with joint attention are not read; "
                "leave weights out"
            )
        numbers = {
            number: site.name for number, site in sites_by_number(model.denoiser, model.sites)
        }
        chosen = {number: keys[name] for number, name in numbers.items() if name in keys}
        load_layout(stored, projector, chosen, where=str(self.weights))


def _text_roles(site: Site) -> tuple[Any, Any]:
    """The layers of the keys and values of the text."""
    return ("add_k", "add_v") if site.has("add_k") else ("k", "v")


def _width_of(sites: list[Site]) -> int:
    """The width of the tokens that all sites read."""
    widths = {site.name: site.projection(_text_roles(site)[0]).in_features for site in sites}
    first = next(iter(widths.values()))
    for name, width in widths.items():
        if width != first:
            raise ValueError(
                f"sites: {name} reads tokens {width} wide, and {next(iter(widths))} {first}; "
                "select sites that read tokens of one width"
            )
    return first
