"""Every recipe is loaded and planned, without a weight, on every family: on those that it names it
makes a plan, on all others it makes one or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from family_folders import MAKERS
from PIL import Image

from trainer.common.declared import header_of
from trainer.common.paths import RECIPES
from trainer.config.load import load_recipe, read_recipe
from trainer.config.schema import Recipe, RecipeError
from trainer.training.without_weights import refuse_unfit

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# those that people look for by name: they make a plan on every family of pictures that reads a
# text; with ranks that layers of tiny networks can have
EVERYWHERE = {
    "lora": ["methods.lora.rank=2"],
    "dora": ["methods.dora.rank=2"],
    "qlora": [
        "methods.lora.rank=2",
        "methods.nf4.min_size=64",
        "methods.nf4.skip=[]",
        "methods.lora.layers=[]",
    ],
    "dreambooth_lora": ["methods.lora.rank=2", "data.token=fox"],
    "custom_diffusion": [],
    "full": ["data.token=fox"],
}
PICTURES = sorted(set(MAKERS) - {"dit", "wan", "ltx", "cogvideox"})
# photos and class images of the user's; a size and no guidance of the tiny folders
OWN = ["data.concept=sprite:penguin", "data.prior_weight=0"]


def named(recipe: str) -> list[str]:
    """The backbones in the commands of its own at the head of a recipe, and the one it starts
    from."""
    commands = "\n".join(header_of(RECIPES / f"{recipe}.yaml")).split("python -m trainer ")
    text = " ".join(
        one for one in commands if re.search(rf"recipe={recipe}\b", one) or "recipe=" not in one
    )
    return ["", *dict.fromkeys(re.findall(r"backbone=(\w+)(?![\w/])", text))]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = MAKERS[family](tmp_path_factory.mktemp("family") / family)
        return made[family]

    return make


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """A recipe with what it needs of the user where it asks for photos."""
    folder = tmp_path_factory.mktemp("own")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "a.txt").write_text("a fox")
    frames = [Image.new("L", (64, 64), 10 * number) for number in range(24)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    needed = {"data.folder": folder, "data.video": folder / "a.gif"}

    def load(recipe: str, *words: str) -> Recipe:
        source = read_recipe(recipe).get("data", {}).get("source")
        own = OWN if source == "concept" else []
        try:
            return load_recipe([f"recipe={recipe}", *own, *words])
        except RecipeError as error:
            if (key := str(error).split(" is missing")[0]) not in needed:
                raise
        return load_recipe([f"recipe={recipe}", f"{key}={needed[key]}", *words])

    return load


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("recipe", "backbone"), [(recipe, name) for recipe in NAMES for name in named(recipe)]
)
def test_a_recipe_is_planned_on_the_backbones_it_names(
    recipe: str, backbone: str, read: Callable[..., Recipe]
) -> None:
    chosen = read(recipe, *([f"backbone={backbone}"] if backbone else []))
    if (recipe, backbone) == ("motion_lora", "sd15"):  # over modules that the user has trained
        with pytest.raises(ValueError, match="weights=tiny_motion: it lacks"):
            refuse_unfit(chosen)
        return
    unknown = refuse_unfit(chosen)
    assert unknown is None or "reads the weights" in unknown


@pytest.mark.sampled(8)
@pytest.mark.parametrize("family", PICTURES)
@pytest.mark.parametrize("recipe", EVERYWHERE)
def test_what_people_look_for_is_planned_on_every_family(
    recipe: str,
    family: str,
    folder_of: Callable[[str], Path],
    read: Callable[..., Recipe],
) -> None:
    words = [f"backbone={folder_of(family)}", "run.resolution=32", *EVERYWHERE[recipe]]
    assert refuse_unfit(read(recipe, *words)) is None


@pytest.mark.sampled(12)
@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("recipe", NAMES)
def test_every_recipe_is_planned_on_every_family_or_refused_by_name(
    recipe: str,
    family: str,
    folder_of: Callable[[str], Path],
    read: Callable[..., Recipe],
) -> None:
    try:
        unknown = refuse_unfit(read(recipe, f"backbone={folder_of(family)}"))
    except ValueError as refusal:  # begins with the key or the method that mends it
        if "reads no text" in str(refusal):
            assert family == "dit"
            return
        start = r"[a-z_]+(\.[\w.]+)*(:|=| is missing| needs)|nothing would train with"
        assert re.match(start, str(refusal)), refusal
    else:
        assert unknown is None or "reads the weights" in unknown
