"""A DINO model as a judge: it compares pictures with pictures, and knows no words.

Trained without labels (Caron et al., arXiv:2104.14294; DINOv2, arXiv:2304.07193), it keeps apart
things of one kind that CLIP, which learns from captions, sees as alike; DreamBooth
(arXiv:2208.12242, section 4.1) prefers it for how faithful pictures of a subject are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    Dinov2Model,
    Dinov2WithRegistersModel,
    ViTImageProcessorPil,
    ViTModel,
)

from trainer.backbones.device import CPU, Placement, place_module
from trainer.evaluation.judge import Pictures, in_parts, model_type
from trainer.media.images import to_pil

# by what config.json calls the model: its class, and how it takes pictures
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit": (ViTModel, ViTImageProcessorPil, {"add_pooling_layer": False}),
    "dinov2": (Dinov2Model, BitImageProcessorPil, {}),
    "dinov2_with_registers": (Dinov2WithRegistersModel, BitImageProcessorPil, {}),
}


class Dino:
    """Embeds pictures (n, 3, H, W) in [-1, 1], or a list of such of several sizes, as (n, d): the
    token of the whole picture after the last norm.

    Raises:
        ValueError: the folder is not a DINO or DINOv2 in transformers layout.
    """

    kind = "DINO"

    def __init__(self, folder: Path, placement: Placement = CPU) -> None:
        found = model_type(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        classifies = any("ForImage" in str(name) for name in config.get("architectures") or ())
        if found not in MODELS or classifies:
            what = f"{found} that classifies pictures" if found in MODELS else found
            raise ValueError(
                f"judge={folder}: a {what} is no judge; give the folder of a CLIP, a DINO "
                "(ViTModel) or a DINOv2 (Dinov2Model) in transformers layout"
            )
        self.folder = folder
        model, processor, options = MODELS[found]
        self.model, loaded = model.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"judge={folder}: its weights lack {missing[0]}; get the model anew")
        place_module(self.model.eval().requires_grad_(False), placement)
        self.device = placement.device
        self.processor = processor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def features(self, pictures: Pictures) -> Tensor:
        """The embeddings (n, d) of pictures, as the model gives them."""
        return torch.cat([self._encode(part) for part in in_parts(pictures)])

    def _encode(self, pictures: Pictures) -> Tensor:
        pixels = self.processor(
            [to_pil(picture) for picture in pictures], return_tensors="pt"
        ).pixel_values
        hidden: Tensor = self.model(pixel_values=pixels.to(self.device)).last_hidden_state
        return hidden[:, 0].cpu()
