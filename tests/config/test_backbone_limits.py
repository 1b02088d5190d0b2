"""What a backbone cannot do is refused by name from its small files, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["backbone=tiny_dit", "run.resolution=100"],
         "run.resolution=100: this backbone takes sides in multiples of 8 pixels; give 96 or 104"),
        (["backbone=tiny", "run.resolution=90"], "multiples of 4 pixels; give 88 or 92"),
        (["recipe=dit_scratch", "denoiser.patch=4", "run.resolution=72"], "multiples of 16 pixels"),
        (["backbone=tiny_dit", "data.prior_sampler=ddim"], "sampler=ddim is for backbones on a VP"),
        (["backbone=tiny_dit", "preview.scheduler=ddpm"], "preview.scheduler=ddpm is for"),
        (["preview.scheduler=ddmp"], "preview.scheduler=ddmp: no such solver; did you mean ddpm?"),
        (["objective.weighting=cosmap"], "objective.weighting=cosmap is for objective.path=flow"),
        (["objective.weighting=sigma_sqrt"], "adds noise on a variance-preserving path"),
        (["run.batch_size=1"], "run.batch_size=1 is too small for 2 groups of data"),
        (["run.batch_size=1"], "give at least 2, or data.prior_weight=0"),
        (["backbone=tiny", "text.max_tokens=75"], "multiple, as in text.max_tokens=90"),
    ],
)  # fmt: skip
def test_refused(words: list[str], says: str) -> None:
    recipe = [] if words[0].startswith("recipe=") else ["recipe=lora"]
    with pytest.raises(RecipeError) as error:
        load_recipe([*recipe, *words])
    assert says in str(error.value)


def test_buckets_are_multiples_of_tokens_too(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "mine.yaml").write_text(
        f"data: {{source: folder, folder: '{tmp_path}', template: a dot, buckets: 4}}\n"
        "methods: {full: {}}\n"
    )
    assert load_recipe([f"recipe={tmp_path / 'mine.yaml'}"])
    with pytest.raises(RecipeError, match=r"data\.buckets=4: .* multiples of 8 pixels; give 8"):
        load_recipe([f"recipe={tmp_path / 'mine.yaml'}", "backbone=tiny_dit"])
    own = [f"recipe={tmp_path / 'mine.yaml'}", "data.buckets=24"]
    with pytest.raises(RecipeError, match=r"data\.buckets=24 does not divide .* of 64 pixels"):
        load_recipe(own)
    with pytest.raises(RecipeError, match=r"does not divide the resolution of 80 pixels"):
        load_recipe([*own, "run.resolution=80"])
    assert load_recipe([*own, "run.resolution=72"])
    with pytest.raises(RecipeError, match=r"data\.buckets=24 does not divide .* of 64 pixels"):
        load_recipe([*own, "backbone=tiny_dit_scratch"])


@pytest.mark.parametrize("words", [
    ["run.resolution=100"], ["backbone=tiny_dit", "run.resolution=96"],
    ["backbone=tiny_dit", "objective.weighting=cosmap"], ["text.max_tokens=90"],
    ["backbone=tiny_dit", "data.prior_sampler=dpmpp"], ["data.prior_sampler=ddim"],
    ["objective.path=flow", "objective.weighting=cosmap"], ["run.batch_size=2"],
    ["run.batch_size=1", "data.prior_weight=0"],
])  # fmt: skip
def test_taken(words: list[str]) -> None:
    assert load_recipe(["recipe=lora", *words])
