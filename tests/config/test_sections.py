"""Every key of a recipe that takes a number: the last value on each side of its bound. And the
defaults, on which recipes and their recorded results rest."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.load import load_recipe
from trainer.config.run_section import RunSpec
from trainer.config.schema import RecipeError
from trainer.config.sections import (
    ContinualSpec,
    EvaluateSpec,
    ObjectiveSpec,
    OptimSpec,
    PreviewSpec,
)

SCENES = ("recipe=tiny_unet",)
CLIPS = ("recipe=animatediff",)
CONCEPT = ("recipe=lora",)

# recipe, key, refused, allowed, further words
BOUNDS: list[tuple[tuple[str, ...], str, str, str, tuple[str, ...]]] = [
    (CONCEPT, "objective.logit_std", "0", "0.001", ("objective.timesteps=logit_normal",)),
    (CONCEPT, "objective.min_snr_gamma", "0", "0.001", ("objective.weighting=min_snr",)),
    (CONCEPT, "objective.offset_noise", "-0.001", "0", ()),
    (CONCEPT, "objective.caption_dropout", "-0.001", "0", ()),
    (SCENES, "objective.caption_dropout", "1.001", "1", ()),
    (CONCEPT, "optim.lr", "0", "1e-9", ()),
    (CONCEPT, "optim.muon_lr", "0", "1e-9", ("optim.name=muon",)),
    (CONCEPT, "optim.lrs.lora", "-1e-9", "1e-9", ()),
    (CONCEPT, "optim.betas", "[-0.001,0.9]", "[0,0.9]", ()),
    (CONCEPT, "optim.betas", "[0.9,1]", "[0.9,0.9999]", ()),
    (CONCEPT, "optim.eps", "0", "1e-12", ()),
    (CONCEPT, "optim.weight_decay", "-0.001", "0", ()),
    (CONCEPT, "optim.warmup", "-1", "0", ()),
    (CONCEPT, "optim.final_lr", "-0.001", "0.001", ("optim.schedule=cosine",)),
    (CONCEPT, "optim.final_lr", "1.001", "1", ("optim.schedule=cosine",)),
    (CONCEPT, "optim.clip", "0", "0.001", ()),
    (CONCEPT, "optim.ema", "0", "0.001", ()),
    (CONCEPT, "optim.ema", "1", "0.9999", ()),
    (CONCEPT, "preview.every", "-1", "0", ()),
    (CONCEPT, "preview.steps", "0", "1", ()),
    (CONCEPT, "preview.guidance", "-0.001", "0", ()),
    (CONCEPT, "preview.true_guidance", "-0.001", "0", ()),
    (CLIPS, "preview.temporal_guidance", "-0.001", "0", ()),
    (CLIPS, "evaluate.temporal_guidance", "-0.001", "0", ()),
    (CONCEPT, "preview.seed", "-1", "0", ()),
    (CONCEPT, "preview.seed", "9223372036854775808", "9223372036854775807", ()),
    (CONCEPT, "run.steps", "0", "1", ()),
    (SCENES, "run.batch_size", "0", "1", ()),
    (CONCEPT, "run.accumulate", "0", "1", ()),
    (CONCEPT, "run.seed", "-1", "0", ()),
    (CONCEPT, "run.seed", "9223372036854775808", "9223372036854775807", ()),
    (CONCEPT, "run.resolution", "15", "16", ()),
    (CONCEPT, "run.devices", "0", "1", ()),
    (CONCEPT, "run.nodes", "0", "1", ()),
    (CONCEPT, "run.workers", "-1", "0", ()),
    (CONCEPT, "run.validate_every", "-1", "0", ()),
    (CONCEPT, "run.checkpoint_every", "-1", "0", ()),
    (CONCEPT, "run.checkpoint_keep", "0", "1", ()),
    (CONCEPT, "run.nonfinite_in_a_row", "0", "1", ("run.on_nonfinite=skip",)),
    (CONCEPT, "run.nonfinite_total", "0", "1", ("run.on_nonfinite=skip",)),
    (CONCEPT, "run.timeouts.step", "-1", "0", ()),
    (CONCEPT, "run.log_every", "0", "1", ()),
    (CONCEPT, "data.prior_images", "-1", "0", ()),
    (CONCEPT, "data.prior_weight", "-0.001", "0", ()),
    (CONCEPT, "data.prior_guidance", "-0.001", "0", ()),
    (CONCEPT, "data.validation", "-1", "0", ()),
    (("recipe=c_lora",), "continual.images", "-1", "0", ()),
    (SCENES, "data.count", "0", "1", ()),
    (SCENES, "data.seed", "-1", "0", ()),
    (SCENES, "data.validation", "-1", "0", ()),
    (CLIPS, "data.count", "0", "1", ()),
    (CLIPS, "data.seed", "-1", "0", ()),
    (CLIPS, "data.validation", "-1", "0", ()),
    (CLIPS, "data.images", "-0.001", "0", ()),
    (CLIPS, "data.images", "1", "0.99", ()),
]


@pytest.mark.parametrize(
    ("recipe", "key", "refused", "allowed", "more"), BOUNDS, ids=[f"{b[1]}={b[2]}" for b in BOUNDS]
)
def test_the_bound_of_a_key(
    recipe: tuple[str, ...], key: str, refused: str, allowed: str, more: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError, match=rf"^{key.rpartition('.')[0]}"):
        load_recipe([*recipe, f"{key}={refused}", *more])
    load_recipe([*recipe, f"{key}={allowed}", *more])


def test_each_concept_of_a_series_has_its_own_words() -> None:
    concepts = ("sprite:penguin", "sprite:fox")
    for name in ("tokens", "class_words", "inits"):
        ContinualSpec(concepts=concepts, **{name: ("a", "b")})
        for given in (("a",), ("a", "b", "c")):
            with pytest.raises(ValueError, match=rf"{name}=\['a'.*for 2 concepts; give one each"):
                ContinualSpec(concepts=concepts, **{name: given})
    assert ContinualSpec(concepts=concepts).words == ("<v1>", "<v2>")
    assert ContinualSpec(concepts=concepts, tokens=("<a>", "<b>")).words == ("<a>", "<b>")


def test_prompts_of_two_concepts_name_two() -> None:
    EvaluateSpec(together=("a {} left of a {}",))
    for prompt in ("a {}", "a {} and a {} and a {}", "two things"):
        with pytest.raises(ValueError, match=r"must hold \{\} twice"):
            EvaluateSpec(together=(prompt,))


def test_a_method_with_an_lr_of_0_is_frozen() -> None:
    assert OptimSpec(lrs={"lora": 0.0, "new_token": 1e-3, "full": 0.0}).frozen == ("lora", "full")


@pytest.mark.parametrize(
    ("section", "defaults"),
    [
        (
            ObjectiveSpec,
            {
                "target": None, "path": None, "timesteps": "uniform", "logit_mean": 0.0,
                "logit_std": 1.0, "weighting": "none", "min_snr_gamma": 5.0, "offset_noise": 0.0,
                "caption_dropout": 0.0, "shift": 1.0,
            },
        ),
        (
            OptimSpec,
            {
                "name": "adamw", "lr": 1e-4, "muon_lr": None, "scale_lr": False, "lrs": {},
                "betas": None, "eps": 1e-8, "weight_decay": 1e-2, "warmup": 0,
                "schedule": "constant", "final_lr": 0.0, "clip": 1.0, "ema": None,
            },
        ),
        (
            PreviewSpec,
            {
                "prompts": (), "every": 100, "steps": 25, "guidance": 5.0, "seed": 0,
                "true_guidance": 1.0, "temporal_guidance": 1.0,
                "negative": "", "maps": None,
            },
        ),
        (
            RunSpec,
            {
                "steps": 1000, "batch_size": 4, "accumulate": 1, "seed": 0, "resolution": None,
                "device": "auto", "devices": 1, "nodes": 1, "precision": "auto", "workers": 0,
                "gradient_checkpointing": False, "channels_last": "auto", "compile": "auto",
                "cache_latents": True, "cache_text": True, "validate_every": 200,
                "checkpoint_every": 500,
                "checkpoint_keep": 2, "on_disk_full": "stop", "on_nonfinite": "raise",
                "nonfinite_in_a_row": 3, "nonfinite_total": 20, "timeouts": {}, "log_every": 10,
                "id": None, "start_from": None,
            },
        ),
        (ContinualSpec, {"concepts": (), "images": 32, "judge": None}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_defaults(section: Any, defaults: dict[str, Any]) -> None:
    found = section().model_dump()
    assert {key: found[key] for key in defaults} == defaults


def test_the_options_of_a_source_do_not_change() -> None:
    """A dataset that is opened again, as by `evaluate`, is the same one."""
    source = load_recipe(["recipe=tiny_unet"]).data
    with pytest.raises(ValueError, match="frozen"):
        source.count = 3  # type: ignore[attr-defined]
