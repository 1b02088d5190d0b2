"""What describes a denoiser that is made from nothing: its size, its heads, where it attends. A
family makes it of these values; importing this file does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from trainer.common.section import Section

GridPlace = int | str  # a grid by its tokens along an edge, or "mid"


class DenoiserSpec(BaseModel):
    """What describes a denoiser that is made from nothing; a family names the one it makes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class UNetSpec(DenoiserSpec):
    """A U-Net made from nothing, of diffusers' blocks: a level for each width, the finest first, on
    a grid half as wide as the one before."""

    sample_size: int = Field(
        16, gt=0, description="latents along an edge, or pixels for a backbone without a VAE"
    )
    width: tuple[PositiveInt, ...] = Field(
        (64, 128, 128), min_length=1, description="channels of each level, the finest first"
    )
    layers: int = Field(
        1, gt=0, description="residual blocks of each level; the way up has one more"
    )
    heads: int = Field(4, gt=0, description="heads of all attention")
    groups: int = Field(16, gt=0, description="groups of the group norms")
    self_attention: tuple[GridPlace, ...] = Field(
        (16, 8, "mid"),
        description="grids, in tokens along an edge, where a transformer block with self-attention "
        "follows every residual block; mid is the middle block, which then has a second residual "
        "block too",
    )
    cross_attention: tuple[GridPlace, ...] = Field(
        (16, 8, "mid"), description="the same for cross-attention, in the same blocks"
    )
    zero_init: bool = Field(
        True, description="transformer blocks add nothing at first (ADM, arXiv 2105.05233)"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="of the weights; layers of one name and size start alike in all networks of "
        "one seed",
    )

    @property
    def grids(self) -> tuple[int, ...]:
        """Tokens along an edge, a level each."""
        return tuple(self.sample_size >> level for level in range(len(self.width)))

    @model_validator(mode="after")
    def _fits(self) -> UNetSpec:
        step = 2 ** (len(self.width) - 1)
        if self.sample_size % step:
            raise ValueError(
                f"sample_size={self.sample_size} does not halve for each of {len(self.width)} "
                f"widths; give a multiple of {step}, or fewer widths"
            )
        for width in self.width:
            if width % self.groups:
                raise ValueError(f"groups={self.groups} does not divide the width {width}")
        places: dict[GridPlace, int] = dict(zip(self.grids, self.width, strict=True))
        places["mid"] = self.width[-1]
        for name in ("self_attention", "cross_attention"):
            for place in getattr(self, name):
                if place not in places:
                    have = ", ".join(map(str, self.grids))
                    raise ValueError(f"{name}={place}: no such grid; this U-Net has {have} and mid")
                if places[place] % self.heads:
                    raise ValueError(
                        f"heads={self.heads} does not divide {places[place]}, the width at {place}"
                    )
        return self


class TransformerSpec(DenoiserSpec):
    """A diffusion transformer made from nothing, as PixArt's: `depth` blocks of `width` channels on
    one grid of sample_size / patch tokens along an edge, all with self-attention."""

    sample_size: int = Field(16, gt=0, description="latents along an edge")
    patch: int = Field(2, gt=0, description="latents along an edge of a token")
    width: int = Field(192, gt=0, description="channels of every block, a multiple of 4")
    depth: int = Field(7, gt=0, description="blocks")
    heads: int = Field(6, gt=0, description="heads of all attention")
    cross_attention: bool = Field(True, description="whether every block reads the text too")
    zero_init: bool = Field(
        True,
        description="all attention adds nothing at first; false leaves that to cross-attention "
        "alone, as PixArt does (arXiv 2310.00426)",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights")

    @model_validator(mode="after")
    def _fits(self) -> TransformerSpec:
        if self.sample_size % self.patch:
            raise ValueError(f"patch={self.patch} does not divide sample_size={self.sample_size}")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        if self.width % 4:
            raise ValueError(
                f"width={self.width} is not a multiple of 4, which position embeddings in two "
                "dimensions need: a sine and a cosine of each"
            )
        return self


class PartsSpec(Section):
    """Parts of the backbone that come from elsewhere: folders with the part, or pipelines that have
    it. For a checkpoint in one file also what the file does not hold."""

    denoiser: str | None = Field(
        default=None,
        description="the U-Net or transformer",
        examples=["./other_pipeline"],
    )
    text_encoder: str | None = Field(
        default=None,
        description="the text encoder, of several the first",
        examples=["./my_text_encoder"],
    )
    text_encoder_2: str | None = Field(
        default=None, description="the second text encoder", examples=["./my_text_encoder"]
    )
    vae: str | None = Field(default=None, description="the VAE", examples=["./sdxl-vae-fp16-fix"])
    tokenizer: str | None = Field(
        default=None,
        description="the tokenizer; for a checkpoint in one file a folder with the vocabulary of "
        "CLIP, vocab.json and merges.txt, which null looks for beside the file and in the hub's "
        "cache",
        examples=["./clip-vit-large-patch14"],
    )
    config: str | None = Field(
        default=None,
        description="of a checkpoint in one file: how its parts are built, as in sd15, sd21 (768 "
        "pixels, v), sd21_base (512 pixels, eps) or sdxl, or a pipeline folder, whose weights are "
        "then not read; null looks at the names and sizes of its tensors",
        examples=["sd21_base"],
    )


class BackboneSpec(Section):
    """A pretrained model: a folder in diffusers layout, or a checkpoint of the hub pinned to a
    commit. What a file in recipes/backbone/ holds."""

    family: str = Field(default="sd", description="the file in trainer/backbones/ that loads it")
    folder: str | None = Field(
        default=None, description="the folder, relative to data/ for one that ships; or give hub"
    )
    overlay: str | None = Field(
        default=None,
        description="a folder whose parts are taken before those of folder, for backbones that "
        "share a VAE and a text encoder",
    )
    parts: dict[str, str] = Field(
        default={},
        description="folders of single parts by their names, taken before all others",
    )
    file: str | None = Field(
        default=None,
        description="a checkpoint in one file, whose weights the parts of folder, which then only "
        "says how they are built, have",
    )
    hub: str | None = Field(
        default=None, description="the repository on the hub, in place of folder"
    )
    revision: str | None = Field(default=None, description="the commit that hub is pinned to")
    stored: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None,
        description="what the weights that hub has are stored in, for plans before they are here; "
        "null for float32",
    )
    scratch: tuple[Literal["unet", "transformer", "vae"], ...] = Field(
        default=(), description="parts that start untrained in place of their stored weights"
    )
    denoiser: SerializeAsAny[DenoiserSpec] | None = Field(
        default=None, description="the network to make in place of the folder's, see help denoiser"
    )
    max_tokens: int | None = Field(
        default=None,
        description="tokens of a prompt that are read, see help text; null for one call",
    )
    adapters: tuple[str, ...] = Field(
        default=(), description="adapters of earlier runs that are part of it, the first one lowest"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> BackboneSpec:
        if (self.folder is None) == (self.hub is None):
            raise ValueError("give either folder or hub")
        if self.hub is not None and self.revision is None:
            raise ValueError("a hub checkpoint needs revision, the commit it is pinned to")
        if self.overlay is not None and self.folder is None:
            raise ValueError("overlay goes over a folder; give folder, not hub")
        if self.file is not None and self.folder is None:
            raise ValueError("file has the weights for a folder of configurations; give folder too")
        return self
