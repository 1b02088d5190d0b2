"""Frozen encoders of pictures: the image tower of a CLIP, or a DINO, from a folder in transformers
layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CLIPVisionModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
    ViTModel,
)
from transformers.utils import logging

from trainer.common.paths import shipped

CLIPS = ("clip", "clip_vision_model")  # what config.json calls a CLIP, whole or its image tower
TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    **dict.fromkeys(CLIPS, (CLIPVisionModelWithProjection, {})),
    "vit": (ViTModel, {"add_pooling_layer": False}),
    "dinov2": (Dinov2Model, {}),
    "dinov2_with_registers": (Dinov2WithRegistersModel, {}),
}
PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, eq=False)
class Seen:
    """What an encoder makes of n pictures: pooled (n, d) of each as a whole, tokens (n, m, d') of
    its class token and its patches."""

    pooled: Tensor
    tokens: Tensor


class ImageEncoder(nn.Module):
    """Pictures (n, 3, H, W) in [-1, 1], each scaled to cover the encoder's square and cut to it, to
    `Seen`. pooled is the image embedding of a CLIP and the class token of a DINO; tokens are the
    last features but one of a CLIP, as IP-Adapter Plus takes them, and the last of a DINO."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, folder: Path) -> None:
        super().__init__()
        self.tower: Any = tower.eval().requires_grad_(False)
        self.folder = folder
        self.side = int(tower.config.image_size)  # type: ignore[union-attr, arg-type]
        self.projects = hasattr(tower, "visual_projection")
        asked = _record_in(folder / PROCESSOR)
        for name in ("mean", "std"):
            value = asked.get(f"image_{name}")
            if not isinstance(value, list) or len(value) != 3:
                raise ValueError(
                    f"{folder / PROCESSOR} has no image_{name} of three colours; get the model anew"
                )
            self.register_buffer(name, torch.tensor(value)[:, None, None].float(), persistent=False)

    def train(self, mode: bool = True) -> ImageEncoder:
        """It stays as it is: nothing in it trains."""
        return self

    @property
    def pooled_width(self) -> int:
        config = self.tower.config
        return int(config.projection_dim if self.projects else config.hidden_size)

    @property
    def token_width(self) -> int:
        return int(self.tower.config.hidden_size)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Seen:
        return self._seen(self._prepared(pictures))

    @torch.no_grad()
    def nothing(self, count: int) -> Seen:
        """What stands for no picture: pooled zeros, and the tokens of a picture of zeros."""
        blank = self.mean.new_zeros((count, 3, self.side, self.side))
        seen = self._seen(blank)
        return Seen(torch.zeros_like(seen.pooled), seen.tokens)

    def _prepared(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[-2:]
        scale = self.side / min(height, width)
        size = [max(self.side, round(edge * scale)) for edge in (height, width)]
        shown = pictures.float()
        if size != [height, width]:
            shown = F.interpolate(shown, size, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = ((edge - self.side) // 2 for edge in size)
        shown = shown[..., top : top + self.side, left : left + self.side]
        return (shown / 2 + 0.5 - self.mean) / self.std

    def _seen(self, pixels: Tensor) -> Seen:
        dtype = next(self.tower.parameters()).dtype
        found = self.tower(pixel_values=pixels.to(dtype), output_hidden_states=self.projects)
        if self.projects:
            return Seen(found.image_embeds.float(), found.hidden_states[-2].float())
        last = found.last_hidden_state.float()
        return Seen(last[:, 0], last)


def _record_in(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is no JSON of names and values."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON of names and values; get the model anew")
    return found


@contextmanager
def _without_report() -> Iterator[None]:
    """Inside, a CLIP whose text model is left unread is not reported."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def open_encoder(given: str) -> ImageEncoder:
    """The encoder in a folder, or of what ships under a name, as `tiny`; where that folder has one
    called `clip`, that.

    Raises:
        ValueError: there is no such folder, or no CLIP or DINO in it.
    """
    folder = shipped(given)
    folder = folder / "clip" if (folder / "clip" / "config.json").is_file() else folder
    for name in ("config.json", PROCESSOR, "*.safetensors"):
        if not any(folder.glob(name)):
            raise ValueError(
                f"encoder={given}: there is no {name} in {folder}; give the folder of a CLIP or a "
                "DINO in transformers layout, which has config.json, preprocessor_config.json and "
                "safetensors weights"
            )
    kind = str(_record_in(folder / "config.json").get("model_type", "unknown"))
    if kind not in TOWERS:
        raise ValueError(
            f"encoder={given}: its model is {kind}; give a CLIP or a DINO ({', '.join(TOWERS)})"
        )
    model, options = TOWERS[kind]
    try:
        with _without_report():
            tower, loaded = model.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"encoder={given}: its weights cannot be read ({why}); get the model anew"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"encoder={given}: its weights lack {missing[0]}; get the model anew")
    return ImageEncoder(tower, folder)
