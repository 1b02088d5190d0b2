"""`ip_adapter`: the layout that `load_ip_adapter` of diffusers and other tools read.

    ip-adapter.safetensors      the projector, and the keys and values of every cross-attention
    image_encoder/              the CLIP image tower it was trained with
    feature_extractor/          how that takes pictures

Strengths of sites are multiplied into the values, and a site that reads no pictures has values of
zero. The order of the sites is that of the U-Net's processors, the middle block last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from trainer.attention.anatomy import is_unet
from trainer.export.bundle import Bundle
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.formats import Format
from trainer.export.job import Job
from trainer.export.stock_references import StockReferences
from trainer.export.tensor_files import save_tensors
from trainer.export.usage import Usage, stock_usage
from trainer.ops.branches.ip_layout import BRANCH, COUNT, IMAGE, sites_by_number
from trainer.ops.branches.projectors import PooledProjector, Resampler
from trainer.ops.ip_adapter import ENCODER, NAME, PROJECTOR, ImageKeys

FILE = "ip-adapter.safetensors"
DEPTH = 4  # blocks of a resampler that readers assume
ENCODER_FOLDER, EXTRACTOR = "image_encoder", "feature_extractor"


def refuse(job: Job) -> None:
    adapted = job.adapted
    if PROJECTOR not in adapted.extras:
        raise CannotCarryError("format=ip_adapter is for methods.ip_adapter, which is not here")
    if not is_unet(adapted.denoiser):
        raise CannotCarryError(
            "format=ip_adapter is for U-Nets: no tool reads such files for "
            f"{type(adapted.denoiser).__name__}"
        )
    if not hasattr(job.base.pipeline(), "load_ip_adapter"):
        raise CannotCarryError("format=ip_adapter: this backbone's pipeline has no load_ip_adapter")
    projector, encoder = adapted.extras[PROJECTOR], adapted.extras[ENCODER]
    if not isinstance(encoder.tower, CLIPVisionModelWithProjection):
        raise CannotCarryError(
            "format=ip_adapter cannot carry an encoder that is no CLIP: readers know no other"
        )
    if isinstance(projector, PooledProjector) and projector.count != COUNT:
        raise CannotCarryError(
            f"format=ip_adapter cannot carry {projector.count} tokens of a picture as a whole: "
            f"every reader assumes {COUNT}"
        )
    if isinstance(projector, Resampler) and len(projector.layers) != DEPTH:
        raise CannotCarryError(
            f"format=ip_adapter cannot carry a resampler of {len(projector.layers)} blocks: every "
            f"reader assumes {DEPTH}"
        )
    if other := [name for name in job.stored if NAME not in name]:
        raise CannotCarryError(
            f"format=ip_adapter cannot carry {other[0]}, {len(other)} tensors in all, beside the "
            "IP-Adapter"
        )


@torch.no_grad()
def write(job: Job, folder: Path, dtype: torch.dtype) -> None:
    refuse(job)
    adapted = job.adapted
    encoder, projector = adapted.extras[ENCODER], adapted.extras[PROJECTOR]
    found = {f"{IMAGE}{name}": value for name, value in projector.named_parameters()}
    for number, site in sites_by_number(adapted.denoiser, adapted.sites):
        k, v = _of_site(adapted, site)
        found |= {f"{BRANCH}{number}.to_k_ip.weight": k, f"{BRANCH}{number}.to_v_ip.weight": v}
    save_tensors(found, folder / FILE, dtype=dtype)
    before = encoder.tower.dtype
    encoder.tower.to(dtype).save_pretrained(folder / ENCODER_FOLDER)
    encoder.tower.to(before)
    CLIPImageProcessor(
        size={"shortest_edge": encoder.side},
        crop_size={"height": encoder.side, "width": encoder.side},
        image_mean=encoder.mean.flatten().tolist(),
        image_std=encoder.std.flatten().tolist(),
    ).save_pretrained(folder / EXTRACTOR)


def _of_site(adapted: Any, site: Any) -> tuple[Tensor, Tensor]:
    """The weights of keys and of values, strength and all."""
    ops = adapted.host.processors[site.name].ops
    own: ImageKeys | None = next((op.image for op in ops if op.name == NAME), None)
    if own is not None:
        return own.to_k.weight, own.scale * own.to_v.weight
    shape = (site.heads * site.head_dim, site.projection("k").in_features)
    return torch.zeros(shape), torch.zeros(shape)


def load_stock_adapter(folder: Path, base: Any) -> StockReferences:
    """What `load_ip_adapter` makes of the files."""
    pipe = base.pipeline()
    pipe.register_modules(feature_extractor=CLIPImageProcessor.from_pretrained(folder / EXTRACTOR))
    pipe.load_ip_adapter(
        str(folder), subfolder="", weight_name=FILE, image_encoder_folder=ENCODER_FOLDER
    )
    return StockReferences(base, pipe)


def read(path: Path, base: Any) -> Bundle:
    """Raises `ValueError`: the method reads such files itself."""
    raise ValueError(
        f"file={path} is an IP-Adapter, which adds attention layers; to start from it, train with "
        f"methods.ip_adapter.weights={path}"
    )


def usage(job: Job, folder: Path) -> Usage:
    return stock_usage(
        job,
        text=(
            f"In ComfyUI with an IP-Adapter extension: copy `{FILE}` to `models/ipadapter`, and "
            f"the model of `{ENCODER_FOLDER}/` to `models/clip_vision`.",
        ),
        imports=("from PIL import Image", "from transformers import CLIPImageProcessor"),
        call=(
            "pipe.register_modules(feature_extractor=CLIPImageProcessor.from_pretrained("
            f'f"{{folder}}/{EXTRACTOR}"))',
            f'pipe.load_ip_adapter(folder, subfolder="", weight_name={FILE!r}, '
            f"image_encoder_folder={ENCODER_FOLDER!r})",
            "pipe.set_ip_adapter_scale(1.0)  # less for more of the text",
            'reference = Image.new("RGB", (256, 256), "red")  # or Image.open("photo.png")',
        ),
        given=("ip_adapter_image=reference",),
    )


FORMAT = Format(
    write,
    readers={"diffusers' load_ip_adapter": load_stock_adapter},
    usage=usage,
    read=read,
    refuse=refuse,
    ops=(NAME,),
)
