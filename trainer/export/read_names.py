"""Finds a model's layers by the names that other tools' files give them.

A name is what stands before a tensor's kind, as in `lora_unet_mid_block_attentions_0_proj_in` or
`text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1`. Tools put one or several
prefixes before it, join it with dots or with underscores, and name blocks as diffusers, as latent
diffusion, or as the model's first code did. A name may be of a fused layer, such as `qkv`, whose
rows are those of several layers here. CLIP in OpenCLIP's code, as in checkpoints of Stable
Diffusion 2.x, calls its layers `transformer.resblocks.0.attn.in_proj_weight`, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.export.layer_names import ldm, original_names, underscored

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "model.")
DENOISER = re.compile(r"(?:lora_)?(?:unet|transformer|diffusion_model|denoiser|dit)\.")
ENCODER = re.compile(
    r"(?:text_encoders\.)?(?:lora_)?"
    r"(te\d?|text_encoder(?:_\d)?|clip_[lgh]|t5(?:xxl)?|gemma\w*|cond_stage_model"
    r"|conditioner\.embedders\.\d)\.(?:transformer\.)?"
)
FLAT = re.compile(r"(?:lora|lycoris)_(.+)")
FLAT_PART = re.compile(r"(?:(unet|transformer|denoiser|dit)|(te\d?|text_encoder(?:_\d)?))_(.+)")
# layers of CLIP in OpenCLIP, or in peft around it, and here; rows of the first are those of q, k, v
OPEN_CLIP = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",), "attn.base_layer.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",), "mlp.c_proj": ("mlp.fc2",),
    "ln_1": ("layer_norm1",), "ln_2": ("layer_norm2",),
}  # fmt: skip
FIRST_OF_CLIP = "encoder.layers.0.self_attn.q_proj"
BEFORE_BLOCKS = ("", "transformer.", "model.transformer.")
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}  # by diffusers' own names
Paths = tuple[str, ...]


class Names:
    """The layers of one model; `names.find(name)` returns the paths that a name stands for."""

    def __init__(self, model: Any) -> None:
        self.tables = {model.denoiser_name: _denoiser_names(model)}
        for part, encoder in model.text_encoders.items():
            named = ((name, module) for name, module in encoder.named_modules())
            own = {
                name.removeprefix("text_model."): (f"{part}.{name}",)
                for name, module in named
                if getattr(module, "weight", None) is not None
            }
            self.tables[part] = _open_clip_names(own) | own
        self.flat = {
            part: {underscored(name): paths for name, paths in table.items()}
            for part, table in self.tables.items()
        }
        self.denoiser, *self.encoders = self.tables
        # tools count the others, such as T5, differently: they are known by their layers' names
        self.clips = [part for part in self.encoders if FIRST_OF_CLIP in self.tables[part]]

    def find(self, name: str) -> Paths | None:
        """The paths of the layer called so, in the order of its rows where it is a fused one; none
        of a layer that the model leaves out, and None if it has no such layer."""
        for part, rest, dotted in _spellings(name):
            tables = self.tables if dotted else self.flat
            for own in self._parts(part):
                rest = rest if own == self.denoiser else _without_level(rest)
                if (found := tables[own].get(rest)) is not None:
                    return found
        return None

    def _parts(self, part: str | int | None) -> list[str]:
        """The parts of the model that a prefix names: all if there is none."""
        if part is None:
            return [self.denoiser, *self.encoders]
        if isinstance(part, int):
            own = self.encoders[part : part + 1]
            return own + [other for other in self.encoders if other not in (*own, *self.clips)]
        return [self.denoiser]


def _spellings(name: str) -> Iterator[tuple[str | int | None, str, bool]]:
    """Every reading of a name: its part (the number of a text encoder, `denoiser`, or None), the
    rest, and whether that is joined with dots."""
    part: str | int | None = None
    rest = name
    while True:
        yield part, rest, True
        if part is None and (match := ENCODER.match(rest)):
            part, rest = _number(match[1]), rest[match.end() :]
        elif part is None and (match := DENOISER.match(rest)):
            part, rest = "denoiser", rest[match.end() :]
        elif wrapper := next((own for own in WRAPPERS if rest.startswith(own)), None):
            rest = rest.removeprefix(wrapper)
        else:
            break
    yield part, rest, False
    if match := FLAT.fullmatch(name):
        if inner := FLAT_PART.fullmatch(match[1]):
            yield "denoiser" if inner[1] else _number(inner[2]), inner[3], False
        yield None, match[1], False


def _number(encoder: str) -> int:
    """Which text encoder a prefix names, counted from 0."""
    if encoder.startswith("conditioner"):
        return int(encoder[-1])
    if encoder.startswith("te") and encoder[-1].isdigit():  # te1, text_encoder_2
        return int(encoder[-1]) - 1
    return int(encoder == "clip_g")


def _without_level(rest: str) -> str:
    """A text encoder's name without the level `text_model`, which transformers 5 dropped."""
    return re.sub(r"^text_model[._]", "", rest)


def _open_clip_names(own: Mapping[str, Paths]) -> dict[str, Paths]:
    """OpenCLIP's names of a CLIP text encoder's layers, from its own; those of the block behind the
    last one stand for nothing: Stable Diffusion 2.x reads what the last block but one gives, so
    that in diffusers' layout the last one is left out."""
    found: dict[str, Paths] = {}
    blocks = sum(name.endswith(".self_attn.q_proj") for name in own)
    for block in range(blocks + 1 if blocks else 0):
        for name, layers in OPEN_CLIP.items():
            here = [f"encoder.layers.{block}.{layer}" for layer in layers]
            paths = tuple(path for layer in here for path in own.get(layer, ()))
            for start in BEFORE_BLOCKS:
                found[f"{start}resblocks.{block}.{name}"] = paths
    last = own.get("final_layer_norm")
    if blocks and last is not None:
        found |= {"ln_final": last, "model.ln_final": last}
    return found


def _denoiser_names(model: Any) -> dict[str, Paths]:
    """Every dotted name of the denoiser's layers, without a prefix."""
    part, denoiser = model.denoiser_name, model.denoiser
    own = [
        n for n, module in denoiser.named_modules() if getattr(module, "weight", None) is not None
    ]
    found: dict[str, Paths] = {name: (f"{part}.{name}",) for name in own}
    known = set(own)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in own if name.endswith(".to_k"))
    for owner in owners:
        for fused, leaves in FUSED.items():
            layers = tuple(f"{owner}.{leaf}" for leaf in leaves)
            if known.issuperset(layers):
                found[f"{owner}.{fused}"] = tuple(f"{part}.{layer}" for layer in layers)
    others = original_names(denoiser)
    if part == "unet":
        others |= {name: (layer,) for layer, name in ldm(denoiser).items()}
    for name, layers in others.items():
        if known.issuperset(layers):
            found.setdefault(name, tuple(f"{part}.{layer}" for layer in layers))
    return found
