"""Pictures of a run have its `run.resolution` everywhere: previews, `sample`, class images. Those
go by keys of their own, whatever the previews are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.config.load import load_recipe
from trainer.training import build
from trainer.training.callbacks import preview

WORDS = [
    "recipe=custom_diffusion", "data.class_word=null", "data.prior_prompts=[a fox]",
    "data.prior_images=1", "data.prior_steps=1", "run.steps=1", "run.batch_size=2",
    "run.validate_every=0", "preview.every=1", "preview.steps=2", "preview.prompts=['a {token}']",
    "preview.maps=null", "tracker=none", "run.resolution=48", "run.id=x",
]  # fmt: skip


def test_previews_class_images_and_sample_follow_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    made: list[Any] = []

    def seen(before: Any, kept: list[Any]) -> Any:
        def call(*args: Any, settings: Any, **more: Any) -> Any:
            kept.append(settings)
            return before(*args, settings=settings, **more)

        return call

    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preview, "sample_many", seen(preview.sample_many, shown))
    monkeypatch.setattr(build, "sample_many", seen(build.sample_many, made))
    words = [*WORDS, f"backbone={tiny_folder}", f"run.out={tmp_path}"]
    assert main(["fit", *words, "data.prior_guidance=1", "data.prior_sampler=euler"]) == 0
    assert {(each.size, each.steps) for each in shown} == {((48, 48), 2)}
    (how,) = made
    assert (how.size, how.steps, how.guidance, how.sampler) == ((48, 48), 1, 1.0, "euler")
    adapter = f"adapter={tmp_path / 'custom_diffusion' / 'x'}"
    for more, side in (([], 48), (["resolution=40"], 40)):
        out = tmp_path / f"out{side}"
        assert main(["sample", adapter, "prompt=a {token}", "steps=1", f"out={out}", *more]) == 0
        (picture,) = out.glob("*.png")
        assert Image.open(picture).size == (side, side)
        assert picture.name == "a-v1-0.png"


def test_previews_do_not_decide_class_images(tiny: Any, tiny_folder: Path) -> None:
    """`preview.steps` and `preview.guidance` did, so another look at a run trained another one."""
    words = ["recipe=custom_diffusion", f"backbone={tiny_folder}", "data.class_word=dog"]
    found = []
    for more in ([], ["preview.steps=3", "preview.guidance=9"]):
        recipe = load_recipe([*words, *more])
        source = recipe.data
        how = (source.prior_steps, source.prior_guidance, source.prior_sampler)  # type: ignore[attr-defined]
        asked = (recipe.evaluate.steps, recipe.evaluate.guidance)
        found.append((how, asked, build.needs(recipe, tiny).generator()))
    assert found[0] == found[1]
    assert found[0][:2] == ((50, 6.0, None), (50, 6.0))  # as the recipe made them before
