"""The judge: a CLIP model that names what pictures show.

Any CLIP folder can judge photos. The embedded world's own judge was also trained to name single
patches, so that it says where a thing is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from trainer.backbones.device import CPU, Placement, place_module
from trainer.data.world.scenes import article
from trainer.media.images import to_pil


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
    """Embeds pictures (n, 3, H, W) in [-1, 1] and texts in one space, as (n, d) of unit length.

    Raises:
        ValueError: the folder is not a CLIP model in transformers layout.
    """

    def __init__(self, folder: Path, placement: Placement = CPU) -> None:
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"judge={folder}: a CLIP folder has config.json and safetensors weights"
            )
        self.folder = folder
        self.model: Any = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        place_module(self.model.eval().requires_grad_(False), placement)
        self.device = placement.device
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        marks = folder / "patches.json"
        self.empty: str | None = json.loads(marks.read_text())["empty"] if marks.is_file() else None

    @property
    def names_patches(self) -> bool:
        """Whether its patches can be named, which is so for the embedded world's judge."""
        return self.empty is not None

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        return torch.cat([self._encode(part)[0] for part in pictures.split(64)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
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

    @torch.no_grad()
    def found(self, pictures: Tensor, words: Sequence[str]) -> Found:
        """How many patches of each picture show each word, and where.

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
            (scale * self._encode(part)[1] @ names.T).softmax(-1)[..., :-1]
            for part in pictures.split(64)
        ]
        shares = torch.cat(parts)  # n patches w
        return Found.of_shares(words, shares)

    def _encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.processor(
            [to_pil(picture) for picture in pictures], return_tensors="pt"
        ).pixel_values
        hidden = self.model.vision_model(pixel_values=pixels.to(self.device)).last_hidden_state
        embeds = self.model.visual_projection(self.model.vision_model.post_layernorm(hidden))
        embeds = F.normalize(embeds, dim=-1).cpu()
        return embeds[:, 0], embeds[:, 1:]


class Metric:
    """The judge with the interface that `torchmetrics.multimodal.CLIPScore` needs: model and
    processor in one."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.config = judge, judge.model.config

    def __call__(
        self, text: Sequence[str] | None = None, images: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        if images is not None:
            return dict(self.judge.processor(list(images), return_tensors="pt"))
        return self.judge.tokens(text or ())

    def to(self, device: Any) -> Metric:
        return self

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(self.judge.device)
        hidden = self.judge.model.vision_model(pixel_values=pixels).pooler_output
        return self.judge.model.visual_projection(hidden).cpu()

    @torch.no_grad()
    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = input_ids.to(self.judge.device)
        hidden = self.judge.model.text_model(input_ids=ids).pooler_output
        return self.judge.model.text_projection(hidden).cpu()


def clip_score(judge: Judge, pictures: Tensor, texts: Sequence[str]) -> float:
    """CLIPScore (arXiv 2104.08718), 0 to 100: the mean over pictures (n, 3, H, W) in [-1, 1] and
    the text of each."""
    metric = Metric(judge)
    score = CLIPScore(model_name_or_path=lambda: (metric, metric))  # type: ignore[arg-type, return-value]
    return float(score([((picture + 1) * 127.5).round().byte() for picture in pictures], texts))


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
