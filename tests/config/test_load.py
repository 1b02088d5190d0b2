"""Recipes: what resolves to what, and every mistake as one message with its key and the mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from trainer.config import overrides
from trainer.config.load import load_recipe, recipe_names, resolve_recipe
from trainer.config.overrides import parse_words
from trainer.config.schema import RecipeError
from trainer.config.tree import merge_trees
from trainer.runs.run_folder import recipe_header

CUSTOM = "recipe=custom_diffusion"
SMALL: dict[str, Any] = {"data": {"source": "world", "count": 8}, "methods": {"selective": {}}}

# words (with ` & ` between them) -> a part of what they are answered with
OVERRIDES = """
backbone=tinny -> backbone=tinny: neither a backbone of ours nor a folder; did you mean tiny?
backbone=README.md -> backbone=README.md: one file, and a folder is needed; give one of
backbone=../custom_diffusion -> backbone=../custom_diffusion: neither a backbone of ours
backbone=3 -> backbone is 3; it is a name or a folder, as in backbone=tiny
backbone= -> backbone is ''; it is a name or a folder, as in backbone=tiny
backbone=recipes -> backbone=recipes: the folder has no model_index.json
tracker=wandbb -> tracker=wandbb: no such tracker; did you mean wandb?
tracker=null -> tracker=None: no such tracker; did you mean none?
optm.lr=1 -> optm: no such key; did you mean optim?
optim.lrr=1 -> optim.lrr: no such key; did you mean optim.lr?
optim.weight-decay=1 -> optim.weight-decay: no such key; did you mean optim.weight_decay?
lr=1 -> lr: no such key; did you mean optim.lr?
steps=1 -> steps: no such key; did you mean run.steps or preview.steps or evaluate.steps?
xyz=1 -> xyz: no such key; there are: recipe, backbone, data, methods, objective, optim
backbones.tiny.run.steps=1 -> backbones: no such key; did you mean backbone?
optim=3 -> optim is 3; it takes name, lr, muon_lr, scale_lr, lrs
optim.name=adamw8 -> optim.name='adamw8': adamw, adamw8bit, paged_adamw8bit, paged_adamw32bit
optim.lr=abc -> optim.lr='abc': a number is needed, above 0
optim.lr.x=1 -> optim.lr: a number is needed, above 0
optim.lr=true -> optim.lr=True: a number is needed
optim.lr=0 -> optim.lr=0: a number is needed, above 0
optim.lr=.inf -> optim.lr=inf: a finite number is needed
optim.betas=[0.9] -> optim.betas=[0.9]: adamw takes 2 numbers, as in [0.9, 0.999]
optim.betas=[0.9, 1.0] -> optim.betas.1=1.0: Input should be less than 1
optim.ema=1 -> optim.ema=1: a number is needed, above 0 and below 1
run.steps=1.5 -> run.steps=1.5: a whole number is needed, at least 1
run.compile=maybe -> run.compile='maybe': auto, true or false is needed
run.channels_last=aut -> run.channels_last='aut': auto, true or false is needed; did you mean auto?
run.compile=2 -> run.compile=2: auto, true or false is needed
run.precision=bf15 -> run.precision='bf15': auto, fast, fp32, bf16 or fp16 is needed; did you mean
run.device=gpu -> run.device='gpu': String should match pattern
run.device=cuda:1 & run.devices=2 -> run.device=cuda:1 is one GPU, and run.devices=2; give run.devi
run.device=cpu & run.accelerator=cuda -> run.device=cpu and accelerator=cuda name two devices; leave
run.resolution=8 -> run.resolution=8: a whole number is needed, at least 16
run.seed=9223372036854775808 -> run.seed=9223372036854775808: a whole number is needed
run.id=../x -> run.id='../x': String should match pattern
run.devices=3 -> run.batch_size=8 does not divide by run.devices x run.nodes = 3
run.devices=2 & run.nodes=16 -> run.devices x run.nodes = 32; give a multiple of 32
run.steps=0 & run.log_every=0 -> run.log_every=0: a whole number is needed, at least 1
objective.target=epss -> objective.target='epss': eps, v, x0 or flow is needed; did you mean eps?
preview.negative=12 -> preview.negative=12: text is needed; quote it, as in preview.negative="'12'"
preview.prompts=a <v1> -> preview.prompts='a <v1>': a list is needed, as in preview.prompts=[a <v1>]
preview.prompts=[a: b] -> preview.prompts.0: text is needed; quote
data.token={a: 1} -> data.token: text is needed; quote it
preview.prompts.0=a -> preview.prompts: a list is needed, as in preview.prompts=[...]
data=3 -> data.source is missing; sources: concept,
data.source=concpt -> data.source=concpt: no such source; did you mean concept?
data.sorce=concept -> data.sorce: no such key; did you mean data.source?
data.prior_image=3 -> data.prior_image: no such key; did you mean data.prior_images?
data.prior_weight=-1 -> data.prior_weight=-1: a number is needed, at least 0
data.prior_weight=.inf -> data.prior_weight=inf: a finite number is needed
data.concept=./nowhere -> data.concept='./nowhere': nowhere: no such folder
data.concept=sprite:pengin -> data.concept='sprite:pengin': no sprite is called pengin; did you
data.prior_folder=./nowhere -> data.prior_folder='./nowhere': nowhere: no such folder
data.prior_prompts=[] -> data: class images need class_word, as in data.class_word=dog
methods=null -> methods is empty, so nothing would train; methods: 
methods=3 -> methods is 3; it maps method names to their options
methods.selectiv.sites=all -> methods.selectiv: no such method; did you mean selective?
methods.selectiv=null -> methods.selectiv: no such method; did you mean selective?
methods.selective=3 -> methods.selective is 3; it takes sites, projections
methods.selective.site=all -> methods.selective.site: no such key; did you mean methods.selective.s
methods.selective.sites=crosss -> methods.selective.sites='crosss': selector 'crosss': unknown term
methods.selective.projections=[k, w] -> methods.selective.projections.1='w': Input should be 'q'
methods.selective=null & methods.new_token=null -> methods is empty (methods.selective=null
methods.new_token.tokens=[<v1>, <v1>] -> methods.new_token.tokens=['<v1>', '<v1>']: a token is named
_target_=os.system -> _target_: recipes name files of ours, never import paths; remove it
optim={_target_: os.system} -> optim._target_: recipes name files of ours
methods.selective._target_.x=1 -> methods.selective._target_: recipes name files of ours
preview.prompts=[a, {x: [{_target_: b}]}] -> preview.prompts.1.x.0._target_: recipes name
data.concept=${oc.env:HOME} -> data.concept: interpolation (${...}) is not allowed in recipes
data.token="\\u0024{oc.env:HOME}" -> data.token: interpolation (${...}) is not allowed in recipes
preview.prompts=[a, '${x}'] -> preview.prompts: interpolation (${...}) is not allowed in recipes
data.token=a ${ b -> data.token: interpolation (${...}) is not allowed in recipes
optim.lr=1 & optim.lr=1 -> optim.lr is given twice
optim.lr -> 'optim.lr' is not key=value, as in optim.lr=1e-4
--optim.lr=1 -> '--optim.lr=1' is not key=value
optim[lr]=1 -> 'optim[lr]=1' is not key=value
optim..lr=1 -> 'optim..lr=1' is not key=value
=1 -> '=1' is not key=value
"""
LINES = [line.split(" -> ") for line in OVERRIDES.strip().splitlines()]


def refusal(*words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(words)
    return str(caught.value)


def write(folder: Path, tree: dict[str, Any] | str) -> str:
    """The word that names a recipe file of the user's own."""
    path = folder / "mine.yaml"
    text = tree if isinstance(tree, str) else yaml.safe_dump(tree)
    path.write_text(text, encoding="utf-8")
    return f"recipe={path}"


@pytest.mark.parametrize(("words", "says"), LINES, ids=[words for words, _ in LINES])
def test_mistake_in_an_override(words: str, says: str) -> None:
    message = refusal(CUSTOM, *words.split(" & "))
    assert says in message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_whose_package_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    says = f"tracker={name} needs the package: pip install 'attention-trainer[{name}]'"
    assert refusal(CUSTOM, f"tracker={name}") == says


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "recipe=<name> is missing; recipes: "),
        (("recipe=3",), "recipe=<name> is missing"),
        (("recipe=custom_difusion",), "no such recipe; did you mean custom_diffusion?"),
        (("recipe=backbone/tiny",), "recipe=backbone/tiny: no such recipe"),
        (("recipe=custom_diffusion.yml",), "no such file; did you mean custom_diffusion?"),
        ((CUSTOM, CUSTOM), "recipe is given twice"),
    ],
    ids=["none", "number", "misspelt", "folder", "missing-file", "twice"],
)
def test_recipe_that_is_not_there(words: tuple[str, ...], says: str) -> None:
    assert says in refusal(*words)


@pytest.mark.parametrize("key", ["folder", "shards"])
def test_missing_folder_of_a_source(tmp_path: Path, key: str) -> None:
    tree = {**SMALL, "data": {"source": key, key: "./nowhere"}}
    assert refusal(write(tmp_path, tree)).startswith(f"data.{key}='./nowhere': nowhere: ")


def test_held_out_images_that_are_all_there_are(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    data = {"source": "folder", "folder": str(tmp_path), "template": "a dot", "validation": 1}
    message = refusal(write(tmp_path, {**SMALL, "data": data}))
    assert message.startswith("data.validation=1 holds out all 1 images in")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data: {source: world, x: {_target_: a.b}}", "data.x._target_: recipes name files"),
        ("backbones: {tiny: {run: {_target_: a.b}}}", "backbones.tiny.run._target_: recipes"),
        ("data: {source: '${oc.env:HOME}'}", "data.source: interpolation (${...}) is not"),
        ("data: {source: !!binary aGk=}", "data.source: bytes is no plain value"),
        ("data: {source: !!python/name:os.system x}", "not readable as YAML: could not"),
        ("data: {a: 1, a: 2}", "not readable as YAML: while constructing a mapping"),
        ("data: [1", "not readable as YAML: while parsing a flow sequence"),
        ("- data", "a recipe is a mapping of backbone, data, methods"),
        ("data: {source: world}\nmethods: {full: }", "(methods.full=null removes it; {} keeps it)"),
        ("backbones: 3", "backbones is 3; it maps backbone names to values for each"),
        ("backbones: {tinny: {}}", "backbones.tinny: no such backbone; did you mean tiny?"),
        ("backbones: {sd15: 3}", "backbones.sd15 is 3; it takes data, methods, objective"),
        ("backbones: {sd15: {rum: {}}}", "backbones.sd15.rum: no such key; did you mean backb"),
        (
            "backbones: {sd15: {base: tiny}, sd21: {}}",
            "base is 'tiny'; it takes another of this ta",
        ),
        ("backbones: {sd15: {base: sd15}}", "no base itself: there is none"),
    ],
    ids=str,
)
def test_mistake_in_a_file(tmp_path: Path, text: str, says: str) -> None:
    message = refusal(write(tmp_path, text))
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("[1, 2.5]", [1, 2.5]), ("null", None), ("true", True), ("", ""),
        ("{a: [b]}", {"a": ["b"]}), ("'12'", "12"), ('"null"', "null"),
        ("[a <v1>, b]", ["a <v1>", "b"]),
        ("a <v1> on a beach", None), ("a: b", None), ("photo: a, b [c] {d}", None),
        ("[a] dog", None),
        ("[a", None), ("{a", None), ("- a", None), ("#1", None), ("a #1", None), ("*star*", None),
        ("&and", None), ("@home", None), ("!bang", None), ("%", None), ("| b", None), ("a=b", None),
        ("a\nb", None), ("'a' and 'b'", None), ("2024-01-01", None), ("???", None),
        ("été 你好", None),
        (" a ", None), ("!!binary aGk=", None), ("!!python/name:os.system", None), ("$HOME", None),
    ],
    ids=repr,
)  # fmt: skip
def test_value_of_an_override(text: str, value: Any) -> None:
    """None stands for the text itself, but for `null`."""
    wanted = text if value is None and text != "null" else value
    found = parse_words([f"preview.negative={text}"])["preview"]["negative"]
    assert found == wanted
    assert type(found) is type(wanted)


def test_a_word_is_read_once_and_gives_values_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["preview.prompts=[one, two]", "evaluate={alone: [three]}"]
    first, wanted = parse_words(words), parse_words(words)
    first["preview"]["prompts"].append("four")
    first["evaluate"]["alone"].clear()
    monkeypatch.setattr(overrides.OmegaConf, "from_dotlist", lambda _: pytest.fail("read again"))
    assert parse_words(words) == wanted
    assert wanted["preview"]["prompts"] == ["one", "two"]
    assert wanted["evaluate"] == {"alone": ["three"]}


def test_overrides_lie_over_the_backbone_over_the_recipe(tmp_path: Path) -> None:
    backbones = {"tiny": {"run": {"steps": 7, "batch_size": 2}, "data": {"seed": 4}}}
    word = write(tmp_path, {**SMALL, "run": {"steps": 5, "log_every": 9}, "backbones": backbones})
    tiny = load_recipe([word, "run.batch_size=6"])
    assert (tiny.run.steps, tiny.run.batch_size, tiny.run.log_every) == (7, 6, 9)
    assert tiny.data.model_dump()["seed"] == 4
    assert tiny.tree["run"] == {"steps": 7, "batch_size": 6, "log_every": 9}
    other = load_recipe([word, "backbone=sd15"])
    assert (other.run.steps, other.run.batch_size, other.run.log_every) == (5, 4, 9)
    assert other.backbone.hub == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert other.data.model_dump()["seed"] == 0


def test_values_of_a_backbone_lie_over_those_of_its_base(tmp_path: Path) -> None:
    own = {"base": "tiny", "run": {"batch_size": 3}}
    backbones = {"tiny": {"run": {"steps": 7, "batch_size": 2}}, "sd15": own}
    word = write(tmp_path, {**SMALL, "run": {"log_every": 9}, "backbones": backbones})
    loaded = load_recipe([word, "backbone=sd15"])
    assert loaded.tree["run"] == {"steps": 7, "batch_size": 3, "log_every": 9}
    assert "base" not in loaded.tree


def test_a_recipe_lies_over_its_base(tmp_path: Path) -> None:
    mine = {
        "base": "custom_diffusion",
        "methods": {"selective": None, "lora": {"rank": 2}},
        "backbones": {"tiny": {"run": {"steps": 3}}},
    }
    loaded, base = load_recipe([write(tmp_path, mine)]), load_recipe([CUSTOM])
    assert list(loaded.methods) == ["new_token", "lora"]
    assert loaded.run == base.run.model_copy(update={"steps": 3})
    assert loaded.data == base.data
    assert loaded.optim == base.optim
    assert "base" not in loaded.tree


def test_a_base_is_found_beside_the_recipe_and_has_a_base_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text(yaml.safe_dump({**SMALL, "run": {"steps": 5, "seed": 1}}))
    (tmp_path / "middle.yaml").write_text("{base: low.yaml, run: {steps: 6, log_every: 2}}")
    loaded = load_recipe([write(tmp_path, "{base: ./middle.yaml, run: {log_every: 3}}")])
    assert (loaded.run.seed, loaded.run.steps, loaded.run.log_every) == (1, 6, 3)
    assert load_recipe([write(tmp_path, "base: null\n" + yaml.safe_dump(SMALL))]).data


@pytest.mark.parametrize(
    ("base", "says"),
    [
        (
            "custom_difusion",
            "base: custom_difusion: no such recipe; did you mean custom_diffusion?",
        ),
        ("other.yaml", "base: other.yaml: no such file"),
        ("mine.yaml", "base is circular, mine.yaml -> mine.yaml; remove one of them"),
        ("via.yaml", "base is circular, mine.yaml -> via.yaml -> mine.yaml; remove one"),
        ([1], "base is [1]; it takes the name of a recipe, or a file"),
        ("bad.yaml", "bad.yaml: a recipe is a mapping of"),
    ],
)
def test_mistake_in_a_base(tmp_path: Path, base: Any, says: str) -> None:
    (tmp_path / "via.yaml").write_text("base: mine.yaml")
    (tmp_path / "bad.yaml").write_text("- data")
    message = refusal(write(tmp_path, {"base": base}))
    assert says in message
    assert "\n" not in message


def test_base_is_no_override() -> None:
    assert refusal(CUSTOM, "base=lora").startswith("base: no such key")


def test_methods_are_removed_and_added_by_override() -> None:
    words = (CUSTOM, "methods.selective=null", "methods.full.text_encoder=true")
    loaded = load_recipe(words)
    assert list(loaded.methods) == ["new_token", "full"]
    assert loaded.methods["full"].model_dump() == {"denoiser": True, "text_encoder": True}


def test_folder_with_a_pipeline_is_a_backbone(tiny_folder: Path) -> None:
    loaded = load_recipe([CUSTOM, f"backbone={tiny_folder}", "data.class_word=animal"])
    assert loaded.backbone.folder == loaded.backbone_name == str(tiny_folder)


def test_merge_leaves_both_sides_alone() -> None:
    low, high = {"a": {"b": 1, "c": [1, 2]}, "d": 3}, {"a": {"c": [4]}, "d": {"e": 5}}
    assert merge_trees(low, high) == {"a": {"b": 1, "c": [4]}, "d": {"e": 5}}
    assert merge_trees(low, {"a": None}) == {"a": None, "d": 3}
    assert (low["d"], high["d"]) == (3, {"e": 5})
    assert low["a"] == {"b": 1, "c": [1, 2]}


def test_loading_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a fox")
    code = (
        "import sys; from trainer.config.load import load_recipe\n"
        f"for name in {recipe_names()!r}:\n"
        f"    own = ['data.folder={tmp_path}'] if name == 'lora_folder' else []\n"
        "    load_recipe([f'recipe={name}', *own])\n"
        "    heavy = {'torch', 'diffusers', 'lightning', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_data_and_method_must_name_the_same_words() -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(["recipe=custom_diffusion", "methods.new_token.tokens=[<v2>]"])
    assert "data.token=<v1>: methods.new_token adds <v2>" in str(error.value)
    both = ["data.token=<v2>", "methods.new_token.tokens=[<v2>]"]
    assert load_recipe(["recipe=custom_diffusion", *both]).data.words == ("<v2>",)
    none = ["recipe=lora", "methods.new_token=null", "data.token=sks"]
    assert load_recipe(none).data.words == ("sks",)
    with pytest.raises(RecipeError, match="<style> is in none of 5 captions, so nothing would"):
        load_recipe(["recipe=custom_diffusion", "methods.new_token.tokens=[<v1>, <style>]"])


def test_an_lr_is_for_a_method_of_the_recipe() -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(["recipe=custom_diffusion", "optim.lrs.new_tokens=1e-3"])
    assert "optim.lrs.new_tokens: no such key; did you mean optim.lrs.new_token?" in str(
        error.value
    )
    with pytest.raises(RecipeError, match=r"optim\.lrs\.new_token=-1"):
        load_recipe(["recipe=custom_diffusion", "optim.lrs.new_token=-1"])


def test_an_lr_of_zero_keeps_what_an_earlier_run_left() -> None:
    words = ["recipe=custom_diffusion", "optim.lrs.new_token=0"]
    with pytest.raises(RecipeError, match=r"optim\.lrs\.new_token=0 keeps it as an earlier run"):
        load_recipe(words)
    words += ["run.start_from=./earlier"]
    tree = recipe_header(load_recipe(words))  # as an adapter carries it: where it began is left out
    name = tree.pop("recipe")
    assert resolve_recipe(name, tree, {}).optim.frozen == ("new_token",)
    assert load_recipe(words).optim.frozen == ("new_token",)
    assert load_recipe([*words, "methods.new_token=null", "data.token=sks"]).optim.frozen == ()


def test_a_file_of_the_users_holds_over_its_bases_values_for_a_backbone(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: lora\noptim: {lr: 5.0e-4}\nrun: {steps: 50}\nmethods: {new_token: null}\n"
        "preview: {prompts: [a fox], maps: null}\nevaluate: {alone: [a fox], beside: []}\n"
        "data: {token: sks, class_word: dog}\n"
    )
    for backbone in ("tiny", "tiny_dit", "sd15"):
        recipe = load_recipe([f"recipe={path}", f"backbone={backbone}", "data.concept=sprite:crab"])
        assert (recipe.optim.lr, recipe.run.steps) == (5e-4, 50), backbone
        assert list(recipe.methods) == ["lora"], backbone
        assert recipe.data.class_word == "dog"  # type: ignore[attr-defined]
        plain = load_recipe(["recipe=lora", f"backbone={backbone}", "data.class_word=dog",
                             "data.concept=sprite:crab"])  # fmt: skip
        assert recipe.optim.weight_decay == plain.optim.weight_decay
    above = load_recipe([f"recipe={path}", "optim.lr=1", "data.concept=sprite:crab"])
    assert above.optim.lr == 1  # the command line holds over both
    own = tmp_path / "own.yaml"
    own.write_text("base: ./mine.yaml\nbackbones: {tiny: {optim: {lr: 7.0e-4}}}\n")
    assert load_recipe([f"recipe={own}", "data.concept=sprite:crab"]).optim.lr == 7e-4
