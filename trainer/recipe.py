"""A recipe: one YAML, `key=value` overrides, and a complete check of both before torch is imported.

Names resolve to files of ours and to nothing else: a backbone to `recipes/backbone/<name>.yaml`, a
data source to `trainer/data/<name>.py`, a method to `trainer/methods/<level>/<name>.py`. A backbone
may also be a folder of weights, or what a finished run has made of one. A recipe that says `base:
<recipe>` states only what differs from that one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import AliasToken, YAMLError, scan

from trainer import leaks, tasks
from trainer.backbones import family_of
from trainer.backbones.scratch import DENOISERS, TransformerSpec, UNetSpec
from trainer.data import Source
from trainer.header import file_of, header
from trainer.hints import nearest
from trainer.methods import Method, find, names
from trainer.resources import BACKBONES, DATA, RECIPES
from trainer.schema import (
    BackboneSpec,
    ContinualSpec,
    EvaluateSpec,
    ObjectiveSpec,
    OptimSpec,
    PreviewSpec,
    Recipe,
    RecipeError,
    RunSpec,
    Section,
)

TRACKERS = ("tensorboard", "wandb", "none")
SECTIONS: dict[str, type[Section]] = {
    "objective": ObjectiveSpec,
    "optim": OptimSpec,
    "run": RunSpec,
    "preview": PreviewSpec,
    "evaluate": EvaluateSpec,
    "continual": ContinualSpec,
}
KEYS = ("recipe", "backbone", "data", "methods", *SECTIONS, "tracker", "denoiser")
T = TypeVar("T", bound=BaseModel)
KEY = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")


def load(arguments: Iterable[str]) -> Recipe:
    """`["recipe=custom_diffusion", "data.concept=./dog"]` to a checked recipe.

    Raises:
        RecipeError: anything wrong with it; nothing has been read but YAML, and folders have been
        seen to exist.
    """
    overrides = parse(arguments)
    name = overrides.pop("recipe", None)
    if not isinstance(name, str):
        raise RecipeError(f"recipe=<name> is missing; recipes: {', '.join(recipe_names())}")
    whole = resolve(name, read_recipe(name), overrides)
    if whole.optim.held and whole.run.start_from is None:  # what an adapter carries has none
        raise RecipeError(
            f"optim.lrs.{whole.optim.held[0]}=0 keeps it as an earlier run left it, and there is "
            "none; give run.start_from=<a run or its adapter>, or an lr above 0"
        )
    return whole


def resolve(name: str, tree: dict[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """Lays the backbone's own values and the overrides over a recipe's tree, and checks the
    whole."""
    tree = dict(tree)
    per_backbone = tree.pop("backbones", None) or {}
    _check_overlays(per_backbone)
    backbone_name = overrides.get("backbone", tree.get("backbone", "tiny"))
    if not isinstance(backbone_name, str) or not backbone_name:
        raise RecipeError(
            f"backbone is {backbone_name!r}; it is a name or a folder, as in backbone=tiny"
        )
    tree = merge(merge(tree, _own_values(per_backbone, _lineage(backbone_name)[0])), overrides)
    tree["backbone"] = backbone_name
    for key in tree:
        homes = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in cls.model_fields]
        if homes and key not in KEYS:
            raise RecipeError(f"{key}: no such key; did you mean {' or '.join(homes)}?")
    refuse_unknown(tree, KEYS, "")
    sections = {key: build(cls, tree.get(key), key) for key, cls in SECTIONS.items()}
    tracker = tree.get("tracker", "tensorboard")
    if tracker not in TRACKERS:
        raise RecipeError(f"tracker={tracker}: no such tracker{nearest(str(tracker), TRACKERS)}")
    data, chosen = _data(tree.get("data")), methods_of(tree.get("methods"))
    _check_words(data, chosen)
    optim = sections["optim"]
    assert isinstance(optim, OptimSpec)
    refuse_unknown(optim.lrs, tree["methods"], "optim.lrs")
    kept = {method: lr for method, lr in optim.lrs.items() if method in chosen}
    sections["optim"] = optim.model_copy(update={"lrs": kept})  # methods.x=null takes its lr along
    spec = backbone_spec(backbone_name, tree.pop("denoiser", None))
    if spec.denoiser is not None and not spec.adapters:
        # whole, so that an adapter does not hang on our defaults
        tree["denoiser"] = spec.denoiser.model_dump(mode="json")
    whole = Recipe(
        name=name,
        backbone_name=backbone_name,
        backbone=spec,
        data=data,
        methods=chosen,
        tracker=tracker,
        tree=tree,
        **sections,  # type: ignore[arg-type]
    )
    if whole.continual.concepts:
        tasks.check(whole)
        for number in range(len(whole.continual.concepts)):
            task(whole, number)
    return whole


def task(whole: Recipe, number: int, start_from: Path | None = None) -> Recipe:
    """The ordinary recipe of concept `number` of a continual one; it goes on from an adapter."""
    tree = merge(whole.tree, tasks.overlay(whole, number))
    start = {"run": {"start_from": str(start_from)}} if start_from else {}
    try:
        return resolve(whole.name, tree, start)
    except RecipeError as error:
        raise RecipeError(f"continual.concepts.{number}: {error}") from None


def parse(arguments: Iterable[str]) -> dict[str, Any]:
    """`key=value` words to a tree; see `_value` for what the values may be."""
    seen: set[str] = set()
    tree: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not KEY.fullmatch(key):
            raise RecipeError(f"{argument!r} is not key=value, as in optim.lr=1e-4")
        if key in seen:
            raise RecipeError(f"{key} is given twice")
        seen.add(key)
        word = _value(_plain(text, key))
        for part in reversed(key.split(".")):
            word = {part: word}
        tree = merge(tree, _plain(word, ""))
    return tree


def _value(text: str) -> Any:
    """`1e-4`, `true`, `null`, `[a, b]` and `{a: 1}` are YAML; the rest is text, so that a prompt
    with colons, brackets or a # stays what it is. Quotes make text of anything."""
    begin = text.strip()[:1]
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (OmegaConfBaseException, YAMLError, AttributeError):
        return text
    assert isinstance(value, dict)
    value = value["value"]
    structure = isinstance(value, dict | list) and begin not in ("[", "{")
    comment = value is None and text.strip().lower() not in ("null", "~")
    bare = isinstance(value, str | bytes) and begin not in ("'", '"')
    return text if structure or comment or bare else value


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def backbone_names() -> list[str]:
    return sorted(path.stem for path in BACKBONES.glob("*.yaml"))


def read_backbone(name: str) -> dict[str, Any]:
    """The tree of a backbone of ours."""
    return read_yaml(BACKBONES / f"{name}.yaml")


def read_recipe(name: str) -> dict[str, Any]:
    """The tree of a shipped recipe, or of a YAML file of the user's (`recipe=./mine.yaml`), laid
    over that of the recipe it names as its `base`."""
    return _over_base(_recipe_file(name, f"recipe={name}", Path()), ())


def _over_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """above: the files that came here by their `base`, the recipe itself first."""
    tree, chain = read_yaml(path), (*above, path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base is {base!r}; it takes the name of a recipe, or a file")
    below = _recipe_file(base, f"{path}: base: {base}", path.parent)
    if below in chain:
        circle = " -> ".join(file.name for file in (*chain, below))
        raise RecipeError(f"{path}: base goes in a circle, {circle}; remove one of them")
    return merge(_over_base(below, chain), tree)


def _recipe_file(name: str, word: str, folder: Path) -> Path:
    """word: how the name was given; folder: where a relative path begins."""
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    path = (folder / Path(name).expanduser()).resolve()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        what = "file" if path.suffix in (".yaml", ".yml") else "recipe"
        raise RecipeError(f"{word}: no such {what}{nearest(path.stem, recipe_names())}")
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        _refuse_aliases(path)
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: not readable as YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of {', '.join(KEYS[1:])}")
    return _plain(tree, "")


def _refuse_aliases(path: Path) -> None:
    """A few lines of them, each naming the one before several times, would fill the memory."""
    text = path.read_text(encoding="utf-8")
    if "*" in text and any(isinstance(token, AliasToken) for token in scan(text)):
        raise RecipeError(
            f"{path}: YAML aliases (*name) are not read; write the value out, or use base: <recipe>"
        )


def spec_of(tree: Mapping[str, Any], instead: str | None = None) -> BackboneSpec:
    """The backbone of a resolved recipe; or another, which brings a denoiser of its own."""
    name = instead or tree["backbone"]
    return backbone_spec(name, tree.get("denoiser") if name == tree["backbone"] else None)


def backbone_spec(name: str, denoiser: Any = None) -> BackboneSpec:
    """A named backbone, a local folder in diffusers layout, or what an earlier run has made of one:
    its folder or adapter. denoiser: a recipe's values over those of a backbone whose denoiser is
    made from nothing."""
    root, given, adapters = _lineage(name)
    if adapters:
        if denoiser is not None:
            raise RecipeError(
                f"denoiser: backbone {name} has a network of its own, which denoiser=null keeps"
            )
        return backbone_spec(root, given).model_copy(update={"adapters": adapters})
    own = None
    if name in backbone_names():
        tree = read_backbone(name)
        own = tree.pop("denoiser", None)
        spec = build(BackboneSpec, tree, f"backbone {name}")
        if spec.folder is not None:
            places = {"folder": spec.folder, "overlay": spec.overlay}
            spec = spec.model_copy(
                update={key: str(DATA / place) for key, place in places.items() if place}
            )
    elif (Path(name).expanduser() / "model_index.json").is_file():
        folder = Path(name).expanduser()
        spec = BackboneSpec(folder=str(folder), family=family_of(folder))
    elif Path(name).expanduser().is_dir():
        raise RecipeError(
            f"backbone={name}: the folder has no model_index.json and no adapter.safetensors; a "
            "diffusers pipeline folder or a finished run is needed"
        )
    else:
        hint = nearest(name, backbone_names())
        raise RecipeError(f"backbone={name}: neither a backbone of ours nor a folder{hint}")
    if spec.folder is not None and not (Path(spec.folder) / "model_index.json").is_file():
        raise RecipeError(f"backbone={name}: {spec.folder} is missing or has no model_index.json")
    return spec.model_copy(update={"denoiser": _denoiser(spec.family, name, own, denoiser)})


def _made_by(name: str) -> dict[str, Any] | None:
    """The recipe of the run a backbone is the result of; None if it is no such."""
    file = file_of(name)
    if name in backbone_names() or file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        return header(file)[0]
    except ValueError as error:
        raise RecipeError(f"backbone={name}: {error}") from None


def _lineage(name: str) -> tuple[str, Any, tuple[str, ...]]:
    """The backbone below what runs have made of it, the denoiser the first of them says, and their
    adapters, the first one first."""
    adapters: list[str] = []
    denoiser = None
    while (tree := _made_by(name)) is not None:
        file = str(file_of(name))
        if file in adapters:
            raise RecipeError(f"backbone={name}: {file} says that it was trained over itself")
        adapters.append(file)
        name, denoiser = tree["backbone"], tree.get("denoiser")
    return name, denoiser, tuple(reversed(adapters))


def _denoiser(family: str, name: str, own: Any, given: Any) -> UNetSpec | TransformerSpec | None:
    """own: what the backbone's file says; given: what the recipe does."""
    if own is None:
        if given is None:
            return None
        made = [each for each in backbone_names() if "denoiser" in read_backbone(each)]
        raise RecipeError(
            f"denoiser: backbone {name} has a network of its own, which denoiser=null keeps; one "
            f"is made from nothing with backbone={' or backbone='.join(made)}"
        )
    values = merge(own, given) if isinstance(given, dict) else own if given is None else given
    return build(DENOISERS[family], values, "denoiser")


def build(cls: type[T], values: Any, key: str) -> T:
    """Validates one flat section; every pydantic complaint becomes a sentence with the full key."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{key} is {values!r}; it takes {', '.join(cls.model_fields)}")
    refuse_unknown(values, cls.model_fields, key)
    try:
        built = cls.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(_sentence(item, key) for item in error.errors())) from None
    for name, value in values.items():
        if isinstance(value, bool) and not isinstance(getattr(built, name), bool):
            raise RecipeError(f"{key}.{name}={value}: a number is needed")
    return built


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`: mappings merge, everything else replaces."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def _check_overlays(tree: Any) -> None:
    """`backbones:` of a recipe maps backbone names to the values that hold for each alone."""
    if not isinstance(tree, dict):
        raise RecipeError(f"backbones is {tree!r}; it maps backbone names to values for each")
    for name, values in tree.items():
        if name not in backbone_names() and "/" not in name:  # a folder has a slash
            raise RecipeError(
                f"backbones.{name}: no such backbone{nearest(name, backbone_names())}"
            )
        if not isinstance(values, dict):
            raise RecipeError(f"backbones.{name} is {values!r}; it takes {', '.join(KEYS[2:])}")
        refuse_unknown(values, ("base", *KEYS[2:]), f"backbones.{name}")
        if "base" in values and values["base"] not in (whole := _without_base(tree)):
            raise RecipeError(
                f"backbones.{name}.base is {values['base']!r}; it takes another of this table that "
                f"has no base itself: {', '.join(whole) or 'there is none'}"
            )


def _without_base(table: Mapping[str, Any]) -> list[str]:
    return [name for name, own in table.items() if isinstance(own, dict) and "base" not in own]


def _own_values(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of `backbones:` for one backbone, over those of the one it names as its `base`."""
    values = dict(table.get(name) or {})
    return merge(table.get(values.pop("base", None)) or {}, values)


def _data(tree: Any) -> Source:
    if not isinstance(tree, dict) or not isinstance(tree.get("source"), str):
        raise RecipeError(f"data.source is missing; sources: {', '.join(Source.names())}")
    values = dict(tree)
    source = values.pop("source")
    if source not in Source.names():
        raise RecipeError(f"data.source={source}: no such source{nearest(source, Source.names())}")
    cls = Source.find(source)
    # what a recipe says for another source goes away with null
    values = {k: value for k, value in values.items() if value is not None or k in cls.model_fields}
    refuse_unknown(values, ("source", *cls.model_fields), "data")
    return build(cls, values, "data")


def _check_words(data: Source, chosen: Mapping[str, Method]) -> None:
    """Where methods add words, the data's own are among them, or a method trains what no caption
    holds. They may add more: a caption beside a photo can hold others."""
    added = {word: name for name, method in chosen.items() for word in method.words}
    if added and (lacking := [word for word in data.words if word not in added]):
        raise RecipeError(
            f"data.token={lacking[0]}: methods.{next(iter(added.values()))} adds "
            f"{', '.join(added)}; name the same words in both"
        )


def methods_of(tree: Any) -> dict[str, Method]:
    """The methods of a recipe's tree, in its order."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError(f"methods is {tree!r}; it maps method names to their options")
    result = {}
    for name, values in tree.items():
        if name not in names():
            raise RecipeError(f"methods.{name}: no such method{nearest(str(name), names())}")
        if values is None:
            continue  # methods.lora=null removes it
        result[name] = build(find(name), values, f"methods.{name}")
    if not result:
        null = f" (methods.{next(iter(tree))}=null removes it; {{}} keeps it)" if tree else ""
        raise RecipeError(
            f"methods is empty{null}, so nothing would train; methods: {', '.join(names())}"
        )
    return result


def _plain(value: Any, key: str) -> Any:
    """Only plain data passes: no interpolation, no `_target_`, nothing that JSON has not, and no
    access token."""
    if isinstance(value, dict):
        if "_target_" in value:
            where = f"{key}._target_" if key else "_target_"
            raise RecipeError(f"{where}: recipes name files of ours, never import paths; remove it")
        return {
            str(name): _plain(item, f"{key}.{name}" if key else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_plain(item, f"{key}.{number}") for number, item in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        raise RecipeError(
            f"{key}: interpolation (${{...}}) is not allowed in recipes; write the value"
        )
    if isinstance(value, str) and (token := leaks.kind_of(value)):
        raise RecipeError(
            f"{key}: an access token ({token}...); a recipe is written into the run folder, the "
            "adapter and the tracker, so keep the token in the environment, and renew this one"
        )
    if not isinstance(value, str | int | float | None):
        raise RecipeError(
            f"{key}: {type(value).__name__} is no plain value; write text or a number"
        )
    return value


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    known = list(known)
    for name in values:
        if name not in known:
            dotted = f"{prefix}." if prefix else ""
            raise RecipeError(f"{dotted}{name}: no such key{nearest(name, known, dotted)}")


def _is_key(part: str) -> bool:
    """Whether a place in a pydantic error is a key of the user's; a branch is called by its
    type."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool", "none", "dict")


def _sentence(error: Any, key: str) -> str:
    kind, given = error["type"], error["input"]
    # behind the field come places in a list, keys of a mapping, and names of a union's branches,
    # which say nothing
    places = [str(part) for part in error["loc"][1:] if isinstance(part, int) or _is_key(part)]
    where = ".".join([key, *map(str, error["loc"][:1]), *places])
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"] and re.match(r"\w+=", message):
        return f"{key}.{message}"
    if kind == "missing":
        return f"{where}: a value is needed"
    if kind == "tuple_type":
        message = f"a list is needed, as in {where}=[{given if isinstance(given, str) else '...'}]"
    elif kind == "string_type":
        message = "text is needed; quote what YAML would read otherwise, as in \"'12'\""
    elif kind == "literal_error":
        near = difflib.get_close_matches(str(given), re.findall(r"'(.+?)'", message), n=1)
        message += f"; did you mean {near[0]}?" if near else ""
    return f"{where}: {message}" if isinstance(given, dict) else f"{where}={given!r}: {message}"
