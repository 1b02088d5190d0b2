"""The layout of published IP-Adapter files, which `load_ip_adapter` of diffusers reads.

image_proj.<parameter>                       the projector, named as in `projectors.py`
ip_adapter.<2 i + 1>.to_k_ip.weight, to_v_ip of the i-th cross-attention, in the order in which
                                             the U-Net registers them: down, up, middle
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.common import pickles
from trainer.ops.branches.projectors import HEAD_DIM, PooledProjector, Resampler
from trainer.ops.ip_adapter import ImageKeys

if TYPE_CHECKING:
    from trainer.attention.sites import Site
    from trainer.backbones.image_encoder import ImageEncoder

IMAGE, BRANCH = "image_proj.", "ip_adapter."
# what reads the encoder, whose width is their last dimension
ENTRIES = (f"{IMAGE}proj.weight", f"{IMAGE}proj_in.weight")
PARTS = {"to_k_ip.weight": "to_k", "to_v_ip.weight": "to_v"}
COUNT = 4  # tokens of the pooled form that readers of the layout assume


@dataclass(frozen=True)
class ProjectorShape:
    """pooled: the form; count: tokens of a picture; inner, depth, heads: of the resampler."""

    pooled: bool
    count: int
    inner: int = 0
    depth: int = 0
    heads: int = 0

    def make(self, encoder: ImageEncoder, width: int) -> nn.Module:
        """A new projector to tokens of a width."""
        if self.pooled:
            return PooledProjector(encoder.pooled_width, width=width, count=self.count)
        return Resampler(
            encoder.token_width,
            width=width,
            count=self.count,
            inner=self.inner,
            depth=self.depth,
            heads=self.heads,
        )


def sites_by_number(denoiser: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[int, Site]]:
    """Every site of cross-attention with its number in the layout."""
    by_name = {site.name: site for site in sites if site.kind == "cross"}
    ordered = [name for name, _ in denoiser.named_modules() if name in by_name]
    return ((2 * index + 1, by_name[name]) for index, name in enumerate(ordered))


def read_layout(where: str) -> dict[str, Tensor]:
    """The tensors of a file of this layout.

    Raises:
        ValueError: there is no such file, it is no safetensors, or of another layout.
    """
    path = Path(where).expanduser()
    if not path.is_file():
        raise ValueError(f"weights={where}: no such file; give the .safetensors of an IP-Adapter")
    if path.suffix in pickles.SUFFIXES:
        raise ValueError(f"weights={where}: {pickles.refusal(path)}")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights={where}: not a safetensors file ({error})") from None
    for part in (IMAGE, BRANCH):
        if not any(key.startswith(part) for key in found):
            raise ValueError(
                f"weights={where}: it has no {part}*, so it is no IP-Adapter; give a file that "
                "load_ip_adapter of diffusers reads"
            )
    return found


def shape_in(tensors: Mapping[str, Tensor], width: int, where: str) -> ProjectorShape:
    """The shape of the projector in a file. width: of the tokens that attention reads.

    Raises:
        ValueError: a projector of another kind, as those for faces.
    """
    if f"{IMAGE}proj.weight" in tensors:
        return ProjectorShape(True, len(tensors[f"{IMAGE}proj.weight"]) // width)
    if f"{IMAGE}latents" not in tensors or f"{IMAGE}layers.0.0.to_q.weight" not in tensors:
        raise ValueError(
            f"weights={where}: its projector is neither that of IP-Adapter nor that of IP-Adapter "
            "Plus; those for faces are not read"
        )
    _, count, inner = tensors[f"{IMAGE}latents"].shape
    blocks = {key.split(".")[2] for key in tensors if key.startswith(f"{IMAGE}layers.")}
    heads = len(tensors[f"{IMAGE}layers.0.0.to_q.weight"]) // HEAD_DIM
    return ProjectorShape(False, count, inner=inner, depth=len(blocks), heads=heads)


@torch.no_grad()
def load_layout(
    tensors: Mapping[str, Tensor],
    projector: nn.Module,
    keys: Mapping[int, ImageKeys],
    *,
    where: str,
) -> None:
    """Copies the tensors of a file into a projector, and into the sites by their numbers.

    Raises:
        ValueError: it lacks a tensor, has further ones, or one of another shape.
    """
    wanted = {f"{IMAGE}{name}": value for name, value in projector.named_parameters()}
    for number, own in keys.items():
        for theirs, ours in PARTS.items():
            wanted[f"{BRANCH}{number}.{theirs}"] = own.get_parameter(f"{ours}.weight")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(
            f"weights={where}: it lacks {missing[0]}, {len(missing)} tensors in all; it was "
            "trained for another backbone"
        )
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(
            f"weights={where}: {extra[0]}, {len(extra)} tensors in all, has no place here: it was "
            "trained for another backbone, or sites leaves some out, or it holds a LoRA too"
        )
    for name, parameter in wanted.items():
        value = tensors[name]
        if value.shape != parameter.shape:
            seen = name in ENTRIES and value.shape[1:] != parameter.shape[1:]
            why = "another encoder: give the one it was trained with as encoder=<folder>"
            raise ValueError(
                f"weights={where}: {name} is {tuple(value.shape)} there and "
                f"{tuple(parameter.shape)} here; it was trained for "
                + (why if seen else "another backbone")
            )
        parameter.copy_(value)
