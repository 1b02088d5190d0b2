"""The judge: a CLIP model that compares pictures with texts and names what they show.

Any CLIP folder can judge photos. The embedded world's own judge was also trained to name single
patches, so that it says where a thing is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from trainer.backbones.device import CPU, Placement, place_module
from trainer.data.world.scenes import article
from trainer.media.images import to_pil

AT_ONCE = 64  # pictures that a judge embeds at once
Pictures = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Found:
    """Where n pictures show w words.

    mass (n, w): how many patches show the word; centers (n, w, 2): their centre as (x, y) in
    [0, 1].
    """

    words: tuple[str, ...]
    mass: Tensor
    centers: Tensor

    @classmethod
    def of_shares(cls, words: Sequence[str], shares: Tensor) -> Found:
        """From the share (n, patches, w) of each patch, row by row, that shows each word."""
        side = round(shares.shape[1] ** 0.5)
        middle = (torch.arange(side) + 0.5) / side
        xs, ys = middle.repeat(side), middle.repeat_interleave(side)
        mass = shares.sum(1)
        weights = shares / mass[:, None].clamp(min=1e-6)
        centers = torch.stack(
            [(weights * xs[:, None]).sum(1), (weights * ys[:, None]).sum(1)], dim=-1
        )
        return cls(tuple(words), mass, centers)

    def top(self, count: int) -> list[list[str]]:
        """The `count` words with the most patches in each picture, most first."""
        return [
            [self.words[i] for i in row] for row in self.mass.topk(count, dim=1).indices.tolist()
        ]


class Judge:
    """Embeds pictures (n, 3, H, W) in [-1, 1], or a list of such of several sizes, and texts in one
    space, as (n, d).

    Raises:
        ValueError: the folder is not a CLIP model in transformers layout.
    """

    kind = "CLIP"

    def __init__(self, folder: Path, placement: Placement = CPU) -> None:
        if (found := model_type(folder)) != "clip":
            raise ValueError(
                f"judge={folder}: a CLIP folder is needed here, and this model is {found}"
            )
        self.folder = folder
        self.model: Any = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        place_module(self.model.eval().requires_grad_(False), placement)
        self.placement, self.device = placement, placement.device
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        marks = folder / "patches.json"
        self.empty: str | None = json.loads(marks.read_text())["empty"] if marks.is_file() else None

    @property
    def names_patches(self) -> bool:
        """Whether its patches can be named, which is so for the embedded world's judge."""
        return self.empty is not None

    @torch.no_grad()
    def features(self, pictures: Pictures) -> Tensor:
        """The embeddings (n, d) of pictures, as the model gives them."""
        return torch.cat([self._encode(part)[:, 0] for part in in_parts(pictures)])

    def images(self, pictures: Pictures) -> Tensor:
        """The embeddings (n, d) of pictures, of unit length."""
        return F.normalize(self.features(pictures), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """The embeddings (n, d) of texts, of unit length."""
        ids = self.tokens(texts)["input_ids"]
        pooled = self.model.text_model(input_ids=ids.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1).cpu()

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask (n, length), padded to the text encoder's length."""
        length = self.model.config.text_config.max_position_embeddings
        found = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return dict(found)

    def named(self, pictures: Tensor, words: Sequence[str]) -> list[str]:
        """The word of `words` whose phrase "a <word>" is nearest to each picture."""
        scores = self.images(pictures) @ self.texts([article(word) for word in words]).T
        return [words[i] for i in scores.argmax(1).tolist()]

    def found(self, pictures: Tensor, words: Sequence[str]) -> Found:
        """How many patches of each picture show each word, and where; ValueError as `shares`."""
        return Found.of_shares(words, self.shares(pictures, words))

    @torch.no_grad()
    def shares(self, pictures: Tensor, words: Sequence[str]) -> Tensor:
        """How much of each patch shows each word, (n, patches, w), the patches row by row.

        Raises:
            ValueError: the judge's patches were not trained to be named.
        """
        if self.empty is None:
            raise ValueError(
                f"judge={self.folder} names complete pictures only; the embedded world's own "
                "judge also names patches"
            )
        names = self.texts([*(article(word) for word in words), self.empty])
        scale = self.model.logit_scale.exp().cpu()
        parts = [
            (scale * F.normalize(self._encode(part)[:, 1:], dim=-1) @ names.T).softmax(-1)[..., :-1]
            for part in in_parts(pictures)
        ]
        return torch.cat(parts)

    def _encode(self, pictures: Pictures) -> Tensor:
        """Of each whole picture, then of each of its patches: (n, 1 + patches, d)."""
        pixels = self.processor(
            [to_pil(picture) for picture in pictures], return_tensors="pt"
        ).pixel_values
        hidden = self.model.vision_model(pixel_values=pixels.to(self.device)).last_hidden_state
        embeds: Tensor = self.model.visual_projection(
            self.model.vision_model.post_layernorm(hidden)
        )
        return embeds.cpu()


def model_type(folder: Path) -> str:
    """What a model in transformers layout says it is, as in clip or dinov2.

    Raises:
        ValueError: the folder lacks a file that a judge needs.
    """
    for name in ("config.json", "preprocessor_config.json", "*.safetensors"):
        if not any(folder.glob(name)):
            what = "safetensors weights" if name.startswith("*") else name
            raise ValueError(
                f"judge={folder}: there is no {what}; the folder of a CLIP or a DINO in "
                "transformers layout has config.json, preprocessor_config.json and safetensors "
                "weights"
            )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("model_type") if isinstance(config, dict) else None)


def in_parts(pictures: Pictures) -> Iterator[Pictures]:
    """Pictures in parts that a model takes at once."""
    return (pictures[first : first + AT_ONCE] for first in range(0, len(pictures), AT_ONCE))


def judge_folder(
    given: str | Path | None, backbone: str | Path | None, *, key: str, instead: str = ""
) -> Path:
    """The judge's folder: the given one, or by default `clip` in the backbone's folder.

    key: the option a user gives it by; instead: another way out, added to the error message.

    Raises:
        ValueError: there is no such folder.
    """
    own = Path(backbone, "clip") if backbone else None
    folder = Path(given).expanduser() if given else own
    if folder is None or not folder.is_dir():
        what = f"{key}={given}: no such folder" if given else "the backbone has no judge of its own"
        raise ValueError(f"{what}; give {key}=<CLIP folder> in transformers layout{instead}")
    return folder


def relation_holds(
    found: Found,
    row: int,
    *,
    first: str,
    second: str,
    relation: tuple[int, int],
    margin: float = 0.1,
) -> bool:
    """Whether, in picture `row`, `second` lies from `first` in the direction `relation` (dx, dy),
    by more than `margin` of the picture's side."""
    one, two = (found.centers[row, found.words.index(word)] for word in (first, second))
    dx, dy = relation
    return bool(dx * (two[0] - one[0]) + dy * (two[1] - one[1]) > margin)
