"""Base beside adapted, in numbers: is the concept there, does it keep company, is the rest still
known?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.pairwise import pairwise_cosine_similarity
from torchmetrics.multimodal import CLIPScore

from trainer import adapter, backbones, recipe
from trainer.backbones.sd import StableDiffusion
from trainer.data import Dataset
from trainer.data.loader import Fixed
from trainer.data.scenes import article
from trainer.data.sprites import ALL, KNOWN
from trainer.fit import needs, objective, optim
from trainer.judge import Judge, Metric
from trainer.module import LEVELS, DiffusionModule
from trainer.sampler import sample_many
from trainer.schema import Recipe

SEED = 10_000  # pictures no preview has shown


def evaluate(
    run: Path, judge_folder: str | None, images: int, batch: int
) -> dict[str, dict[str, float | None]]:
    """Judges a run folder, prints the table and keeps it as `evaluation.json` in the folder.

    Raises:
        ValueError: no adapter there, or no judge for this backbone.
    """
    path = run / "adapter.safetensors" if run.is_dir() else run
    adapted, tree = adapter.load(path)
    run_recipe = recipe.resolve(tree.get("recipe", path.parent.parent.name), tree, {})
    base = (
        backbones.load(run_recipe.backbone, run_recipe.backbone_name).eval().requires_grad_(False)
    )
    judge = Judge(_judge_folder(judge_folder, base))
    train, held_out = run_recipe.data.open(needs(run_recipe, base))
    examiner = Examiner(run_recipe, judge, train, images, batch)
    table = {"base": examiner.examine(base), "adapted": examiner.examine(adapted)}
    for name, model in (("base", base), ("adapted", adapted)):
        table[name]["validation loss"] = validation_loss(run_recipe, model, held_out)
    show(table, f"{run}, judged by {judge.folder.name}, {images} pictures a line", Console())
    target = path.parent / "evaluation.json"
    target.write_text(json.dumps(table, indent=1), encoding="utf-8")
    return table


class Examiner:
    """Paints the recipe's evaluation prompts with a model and reads the pictures with the judge."""

    def __init__(
        self, chosen: Recipe, judge: Judge, train: Dataset, images: int, batch: int
    ) -> None:
        self.recipe, self.judge, self.num_images, self.batch = chosen, judge, images, batch
        self.token = str(getattr(chosen.data, "token", ""))
        concept = str(getattr(chosen.data, "concept", ""))
        self.sprite = concept.removeprefix("sprite:") if concept.startswith("sprite:") else None
        rows = {number: list(group) for number, group in enumerate(train.groups)}
        self.photos = judge.images(_pictures(train, rows[0]))
        self.others = judge.images(_pictures(train, rows[1][:32])) if len(rows) > 1 else None

    def examine(self, model: StableDiffusion) -> dict[str, float | None]:
        asked = self.recipe.evaluate
        scores: dict[str, float | None] = {}
        if asked.alone:
            pictures, prompts = self._paint(model, asked.alone, self.num_images)
            scores["concept accuracy"] = self._concept_accuracy(pictures)
            scores["image similarity"] = float(
                pairwise_cosine_similarity(self.judge.images(pictures), self.photos).mean()
            )
            scores["text alignment"] = self._alignment(pictures, prompts)
        if asked.beside and self.sprite and self.judge.names_patches:
            pictures, prompts = self._paint(model, asked.beside, self.num_images)
            seen = self.judge.found(pictures, ALL).top(2)
            others = [_sprite_in(prompt) for prompt in prompts]
            scores["concept beside another"] = _share(self.sprite in pair for pair in seen)
            scores["the other beside it"] = _share(
                word in pair for word, pair in zip(others, seen, strict=True)
            )
        if asked.known and self.judge.names_patches:
            prompts = [
                template.replace("{}", article(word)) for template in asked.known for word in KNOWN
            ]
            pictures = self._sample(model, prompts)
            scores["known sprites"] = _accuracy(
                self.judge.named(pictures, ALL), [_sprite_in(p) for p in prompts]
            )
        return scores

    def accuracy(self, model: StableDiffusion) -> float | None:
        """Concept accuracy alone."""
        pictures, _ = self._paint(model, self.recipe.evaluate.alone, self.num_images)
        return self._concept_accuracy(pictures)

    def _concept_accuracy(self, pictures: Tensor) -> float | None:
        """Named right among all sprites; for photographs, nearer to the concept's photos than to
        the class images."""
        if self.sprite is not None and self.judge.names_patches:
            return _accuracy(self.judge.named(pictures, ALL), [self.sprite] * len(pictures))
        if self.others is None:
            return None
        embeds = self.judge.images(pictures)
        return float(
            ((embeds @ self.photos.mean(0)) > (embeds @ self.others.mean(0))).float().mean()
        )

    def _alignment(self, pictures: Tensor, prompts: Sequence[str]) -> float | None:
        """CLIPScore (0 to 100) of the prompt with the token's word in plain text."""
        word = self.sprite or getattr(self.recipe.data, "class_word", None)
        if word is None:
            return None
        texts = [
            prompt.replace(f"{self.token} {word}", word).replace(self.token, word)
            for prompt in prompts
        ]
        metric = Metric(self.judge)
        score = CLIPScore(model_name_or_path=lambda: (metric, metric))  # type: ignore[arg-type, return-value]
        return float(score([((picture + 1) * 127.5).round().byte() for picture in pictures], texts))

    def _paint(
        self, model: StableDiffusion, prompts: Sequence[str], count: int
    ) -> tuple[Tensor, list[str]]:
        every = [prompts[i % len(prompts)] for i in range(count)]
        return self._sample(model, every), every

    def _sample(self, model: StableDiffusion, prompts: Sequence[str]) -> Tensor:
        look = self.recipe.preview
        seeds = [SEED + i for i in range(len(prompts))]
        return sample_many(
            model, prompts, seeds, self.batch, look.steps, look.guidance, look.negative
        )


@torch.no_grad()
def validation_loss(
    chosen: Recipe, model: StableDiffusion, held_out: Dataset | None
) -> float | None:
    """The validation loss of training, on the same noise: `val/loss` of the run's tracker."""
    if held_out is None:
        return None
    module = DiffusionModule(model, objective(chosen, model), optim(chosen), (), chosen.run.seed)
    fixed = Fixed(held_out, 16, LEVELS, None)
    losses = [module.sample_losses(fixed[i], "validate", 0.0)[0] for i in range(len(fixed))]
    return float(torch.cat(losses).mean())


def show(table: dict[str, dict[str, float | None]], title: str, console: Console) -> None:
    sheet = Table(title=title, title_justify="left")
    sheet.add_column("")
    for name in table:
        sheet.add_column(name, justify="right")
    for line in next(iter(table.values())):
        sheet.add_row(line, *(_written(line, scores[line]) for scores in table.values()))
    console.print(sheet)


def _written(line: str, value: float | None) -> str:
    if value is None:
        return "-"
    percent = line in (
        "concept accuracy",
        "concept beside another",
        "the other beside it",
        "known sprites",
    )
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _accuracy(said: Sequence[str], right: Sequence[str]) -> float:
    metric = MulticlassAccuracy(num_classes=len(ALL), average="micro")
    numbers = {word: number for number, word in enumerate(ALL)}
    return float(
        metric(torch.tensor([numbers[w] for w in said]), torch.tensor([numbers[w] for w in right]))
    )


def _share(hits: Any) -> float:
    listed = list(hits)
    return sum(listed) / len(listed)


def _sprite_in(prompt: str) -> str:
    found = [word for word in prompt.replace(",", " ").split() if word in KNOWN]
    if len(found) != 1:
        raise ValueError(
            f"evaluate: the prompt {prompt!r} must name one known sprite, and names "
            f"{found or 'none'}"
        )
    return found[0]


def _pictures(data: Dataset, rows: Sequence[int]) -> Tensor:
    return torch.stack([data.image(row) for row in rows])


def _judge_folder(given: str | None, base: StableDiffusion) -> Path:
    folder = Path(given).expanduser() if given else base.folder / "clip"
    if not folder.is_dir():
        raise ValueError(
            f"judge={folder}: no such folder; give judge=<CLIP folder> in transformers layout"
        )
    return folder
