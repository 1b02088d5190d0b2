"""How good a tiny backbone is, by the CLIP judge, beside the judge's own score on real scenes.

python bench/tiny_backbone.py [--quick] [--backbone tiny] [--grid docs/world.png]

The bars of any other backbone than `tiny` are within five points of what `tiny` has in the result
file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import RESULTS, Bars, parser_of
from PIL import Image
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.config.lineage import backbone_spec
from trainer.data.world.scenes import RELATIONS, Scene, draw_scene
from trainer.data.world.sprites import ALL, KNOWN
from trainer.diffusion.sampler import sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.judge import Judge, relation_holds
from trainer.evaluation.second_judge import SecondJudge
from trainer.evaluation.shares import Share, share
from trainer.evaluation.sprite_fidelity import fidelity
from trainer.evaluation.sprite_scores import share_named
from trainer.media.grids import grid
from trainer.media.images import to_tensor

SEED = 424_242  # scenes that no training drew


BARS = {"generated_one": 0.80, "generated_two_both": 0.45, "generated_two_relation": 0.80}


def bars_of(name: str) -> dict[str, float]:
    if name == "tiny":
        return BARS
    figures = json.loads((RESULTS / "tiny_backbone.json").read_text(encoding="utf-8"))["figures"]
    return {key: figures[key]["measured"] - 0.05 for key in BARS}


def real(scenes: Sequence[Scene]) -> Tensor:
    return torch.stack([to_tensor(Image.fromarray(scene.image)) for scene in scenes])


def words(scene: Scene) -> list[str]:
    """The scene's sprites in the order of its caption."""
    names = [item.word for item in scene.objects]
    return sorted(names, key=lambda word: re.search(rf"\b{word}\b", scene.caption).start())  # type: ignore[union-attr]


def one(judge: Judge | SecondJudge, pictures: Tensor, scenes: Sequence[Scene]) -> Share:
    return share_named(judge.named(pictures, ALL), [scene.objects[0].word for scene in scenes])


def two(
    judge: Judge | SecondJudge, pictures: Tensor, scenes: Sequence[Scene]
) -> tuple[Share, float]:
    """Shares of pictures with both sprites right, and, among those, with the stated relation
    right."""
    found = judge.found(pictures, ALL)
    both = [row for row, pair in enumerate(found.top(2)) if set(pair) == set(words(scenes[row]))]

    def placed_right(row: int) -> bool:
        first, second = words(scenes[row])
        relation = RELATIONS[str(scenes[row].relation)]
        return relation_holds(found, row, first=first, second=second, relation=relation)

    placed = [placed_right(row) for row in both]
    return Share(len(both) / len(scenes), len(scenes)), share(placed) if placed else 0.0


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--grid", type=Path, help="also write a picture of what it paints")
    options = parser.parse_args()
    shipped = options.backbone == "tiny"
    bars = Bars("tiny_backbone" if shipped else Path(options.backbone).name, options.quick)
    limits = bars_of(options.backbone)
    backbone = (
        load_backbone(backbone_spec(options.backbone), options.backbone)
        .eval()
        .requires_grad_(False)
    )
    judge = Judge(backbone.folder / "clip")
    count = 48 if options.quick else 200

    unseen = [draw_scene(SEED, i, ALL, count=1) for i in range(400 if options.quick else 2000)]
    bars.at_least("judge_real_one", one(judge, real(unseen), unseen), 0.95)
    relations = ("left of", "above")
    pairs = [
        draw_scene(SEED + 1, i, KNOWN, count=2, relation=relations[i % 2]) for i in range(count)
    ]
    both, placed = two(judge, real(pairs), pairs)
    bars.note("judge_real_two_both", both)
    bars.note("judge_real_two_relation", placed)

    singles = [draw_scene(SEED + 2, i, KNOWN, count=1) for i in range(count)]
    bars.note("judge_real_one_known", one(judge, real(singles), singles))
    look = Sampling(options.steps, options.guidance)
    seeds = list(range(count))
    alone = sample_many(
        backbone, [scene.caption for scene in singles], seeds, settings=look, batch_size=50
    )
    generated = {"generated_one": one(judge, alone, singles)}
    beside = sample_many(
        backbone, [scene.caption for scene in pairs], seeds, settings=look, batch_size=50
    )
    both, placed = two(judge, beside, pairs)
    generated |= {"generated_two_both": both, "generated_two_relation": placed}
    for key, limit in limits.items():
        bars.at_least(key, generated[key], limit)
    second = SecondJudge(backbone.folder / "second_judge")
    pair, stands = two(second, beside, pairs)
    for name, found, bar in (
        ("generated_one", one(second, alone, singles), 0.90),
        ("generated_two_both", pair, 0.75),
        ("generated_two_relation", stands, 0.95),
    ):
        bars.at_least(f"second_judge_{name}", found, bar)
    shown = [scene.objects[0].word for scene in singles[:48]]
    bars.note("fidelity_real", fidelity(real(singles[:48]), shown).score)
    bars.note("fidelity_generated", fidelity(alone[:48], shown).score)
    bars.note("sampling", {"pictures": count, **look})
    if options.grid:
        options.grid.parent.mkdir(parents=True, exist_ok=True)
        rows = [("", part) for part in (alone[:8], alone[8:16], beside[:8], beside[8:16])]
        grid(rows, side=128).quantize(128).save(options.grid, optimize=True)
    bars.write()


if __name__ == "__main__":
    main()
