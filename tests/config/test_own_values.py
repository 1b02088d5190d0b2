"""What a recipe says for a family of backbones, and for one by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from flow_folders import flux1_pipeline, make_flow_folder

from trainer.config.lineage import backbone_names, family_of_backbone, read_backbone
from trainer.config.load import load_recipe, read_recipe, recipe_names
from trainer.config.own_values import with_own_values
from trainer.config.run_length import laid_over
from trainer.config.schema import RecipeError

PHOTOS = ["data.concept=sprite:penguin", "data.prior_weight=0"]
# the published models that the recipes have values for, as those who train them do
LARGE = (
    "sdxl",
    "sd3",
    "sd35_large",
    "flux1_dev",
    "chroma",
    "flux2_klein",
    "qwen_image",
    "z_image",
    "sana_1600m",
    "sana_600m",
)


def tree(**more: Any) -> dict[str, Any]:
    return {"run": {"steps": 5, "log_every": 9}, "methods": {"lora": {}, "full": None}, **more}


def test_a_name_lies_over_a_family_over_the_recipe() -> None:
    families = {"sd": {"run": {"steps": 6, "batch_size": 2, "seed": 1}}}
    backbones = {"tiny": {"run": {"batch_size": 3, "seed": 2}}}
    own = tree(families=families, backbones=backbones)
    found = with_own_values(own, "tiny", lambda: "sd")
    assert found["run"] == {"steps": 6, "log_every": 9, "batch_size": 3, "seed": 2}
    assert found.keys() == tree().keys()
    other = with_own_values(own, "sd15", lambda: "sd")
    assert other["run"] == {"steps": 6, "log_every": 9, "batch_size": 2, "seed": 1}
    assert with_own_values(own, "sdxl", lambda: "sdxl")["run"] == tree()["run"]


def test_the_family_is_asked_for_only_where_there_is_a_table_of_them() -> None:
    def asked() -> str:
        raise AssertionError

    assert with_own_values(tree(), "tiny", asked) == tree()


def test_a_family_brings_no_method_to_a_recipe() -> None:
    families = {"sd": {"methods": {"lora": {"rank": 4}, "full": {}, "dora": {"rank": 4}}}}
    found = with_own_values(tree(families=families), "tiny", lambda: "sd")
    assert found["methods"] == {"lora": {"rank": 4}, "full": None}


def test_a_family_takes_the_values_of_its_base() -> None:
    families = {"flux1": {"run": {"seed": 1, "steps": 2}}, "chroma": {"base": "flux1"}}
    families["wan"] = {"base": "flux1", "run": {"steps": 3}}
    for family, run in (("chroma", {"seed": 1, "steps": 2}), ("wan", {"seed": 1, "steps": 3})):
        found = with_own_values(tree(families=families), "x", lambda own=family: own)
        assert found["run"] == {"log_every": 9, **run} and "base" not in found


def test_rates_of_another_optimiser_are_not_taken_along() -> None:
    low = {"families": {"sd": {"optim": {"lr": 4e-4, "warmup": 3}, "run": {"steps": 2}}}}
    found = laid_over(low, {"optim": {"name": "prodigy"}})
    assert found["families"] == {"sd": {"optim": {"warmup": 3}, "run": {"steps": 2}}}


@pytest.mark.parametrize(
    ("families", "says"),
    [
        (3, "families is 3; it maps family names to values for each"),
        ({"sdx": {}}, "families.sdx: no such family; did you mean sdxl?"),
        ({"sdxl": 3}, "families.sdxl is 3; it takes data, methods, objective"),
        ({"sdxl": {"rum": {}}}, "families.sdxl.rum: no such key"),
        ({"sdxl": {"base": "wan"}}, "families.sdxl.base is 'wan'; it takes another of this table"),
        ({"./mine": {}}, "families../mine: no such family"),
    ],
)
def test_a_mistake_in_it(families: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": "lora", "families": families}))
    with pytest.raises(RecipeError) as caught:
        load_recipe([f"recipe={file}", *PHOTOS])
    assert says in str(caught.value)


def test_a_folder_has_the_values_of_its_family(tmp_path: Path) -> None:
    """As the name has: people train on models of their own."""
    folder = make_flow_folder(tmp_path / "mine", flux1_pipeline)
    assert family_of_backbone(str(folder)) == family_of_backbone("flux1_dev") == "flux1"
    recipe = load_recipe(["recipe=lora", f"backbone={folder}", *PHOTOS])
    assert recipe.methods["lora"].model_dump()["rank"] == 16
    assert (recipe.run.batch_size, recipe.run.accumulate) == (2, 4)
    assert recipe.run.gradient_checkpointing and recipe.objective.timesteps == "logit_normal"
    given = load_recipe(
        ["recipe=lora", f"backbone={folder}", *PHOTOS, "methods.lora.rank=4", "run.batch_size=3"]
    )
    assert given.methods["lora"].model_dump()["rank"] == 4 and given.run.batch_size == 3


@pytest.mark.parametrize("backbone", LARGE)
def test_a_lora_of_a_large_model_is_as_those_who_train_it_have_it(backbone: str) -> None:
    recipe = load_recipe(["recipe=lora", f"backbone={backbone}", *PHOTOS])
    assert (recipe.run.batch_size, recipe.run.accumulate) == (2, 4)
    assert recipe.run.gradient_checkpointing
    assert recipe.optim.lr == {"sd3": 4e-4, "qwen_image": 2e-4}.get(backbone, 1e-4)
    dora = load_recipe(["recipe=dora", f"backbone={backbone}", *PHOTOS])
    ranks = {r.methods[n].model_dump()["rank"] for r, n in ((recipe, "lora"), (dora, "dora"))}
    assert (
        ranks == {8 if backbone[:4] in ("sdxl", "sana") else 16}
        and list(dora.methods)[-1] == "dora"
    )


def test_shipped_recipes_are_as_before_on_the_small_backbones() -> None:
    """No family that a small backbone belongs to has values."""
    small = {
        read_backbone(name)["family"]
        for name in backbone_names()
        if "hub" not in read_backbone(name)
    }
    assert {"sd", "pixart", "sana"} <= small
    for name in recipe_names():
        assert not small & (read_recipe(name).get("families") or {}).keys()
