"""What `help` prints of each topic, from what verbs, records, methods and recipes declare."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trainer.cli.list import INDENT, TABLES, WIDTH, entry
from trainer.cli.usage import LIGHT_VERBS, VERBS, verb_module

if TYPE_CHECKING:
    from pydantic import BaseModel


def denoiser_specs() -> list[type[BaseModel]]:
    from trainer.backbones.spec import TransformerSpec, UNetSpec

    return [UNetSpec, TransformerSpec]


def verb_page(verb: str) -> Iterator[str]:
    if verb in LIGHT_VERBS:
        yield from _paragraph(verb_module(verb).run.__doc__)
        return
    yield from command_page(verb)


def command_records() -> dict[str, type[BaseModel]]:
    """The options of each verb, and of each command of `data`."""
    from trainer.cli.data import COMMANDS

    verbs = [verb for verb in VERBS if verb not in (*LIGHT_VERBS, "data")]
    found = {verb: getattr(verb_module(verb), f"{verb.capitalize()}Options") for verb in verbs}
    return found | {f"data {name}": options for name, (_, options) in COMMANDS.items()}


def command_page(command: str) -> Iterator[str]:
    yield from _command(command, command_records()[command])


def _command(verb: str, options: type[BaseModel]) -> Iterator[str]:
    from trainer.cli.options import RecipeOptions
    from trainer.common.section import keys_of

    words = [
        f"{name}={field.examples[0]}" for name, field in keys_of(options).items() if field.examples
    ]
    recipe = ["recipe=custom_diffusion"] if issubclass(options, RecipeOptions) else []
    yield f"python -m trainer {verb} [key=value ...]"
    yield ""
    yield from _paragraph(options.__doc__)
    yield ""
    yield f"  python -m trainer {verb} {' '.join([*recipe, *words])}"
    yield ""
    yield described(options)
    if recipe:
        yield entry("recipe", "the recipe by name or as a YAML file; see `list recipes`")
        yield entry("<key of the recipe>", "see `help recipe`")


def section_page(name: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"{name}: a section of a recipe"
    yield ""
    yield from _paragraph(section.__doc__)
    yield ""
    yield from _options_of(section, name)


def method_page(name: str) -> Iterator[str]:
    from trainer.cli.list import sentence_of
    from trainer.common.declared import declared
    from trainer.common.lookup import method_files
    from trainer.methods.apply import find_method

    path = next(path for path in method_files() if path.stem == name)
    facts, method = declared(path), find_method(name)
    yield from textwrap.wrap(f"methods.{name}: {facts.systems}", WIDTH)
    yield ""
    yield from _paragraph(sentence_of(facts))
    yield ""
    yield f"  {example_of(name)}"
    yield ""
    yield from _options_of(method, f"methods.{name}")


def example_of(method: str) -> str:
    """A command that runs a method: of the recipe of its name or with the fewest other methods, or
    of its file."""
    from trainer.cli.methods_table import recipes_of
    from trainer.common.declared import commands_in, header_of
    from trainer.common.lookup import method_files
    from trainer.common.paths import RECIPES

    recipes = recipes_of(method)
    if recipes:
        return commands_in(header_of(RECIPES / f"{recipes[0]}.yaml"))[0]
    path = next(path for path in method_files() if path.stem == method)
    return commands_in(path.read_text(encoding="utf-8").replace("\\\\\n", "\\\n").splitlines())[0]


def source_page(name: str) -> Iterator[str]:
    from trainer.common.declared import docstring_summary
    from trainer.common.lookup import source_files
    from trainer.data.source import Source

    path = next(path for path in source_files() if path.stem == name)
    source = Source.find(name)
    yield f"data.source={name}"
    yield ""
    yield from _paragraph(f"{docstring_summary(path)} {source.__doc__}")
    yield ""
    yield from _options_of(source, "data")


def data_page() -> Iterator[str]:
    from trainer.cli.data import COMMANDS

    yield "python -m trainer data <command> [key=value ...]"
    yield ""
    for name, (_, options) in COMMANDS.items():
        yield entry(name, _line(options.__doc__))
    yield ""
    yield "`help data <command>` prints the options of one."
    yield ""
    yield "data: the section of a recipe that chooses a data source, as in data.source=folder"
    yield ""
    for name, sentence in TABLES["data"]():
        yield entry(name, sentence)
    yield ""
    yield "`help data.<source>` prints the options of one."


def methods_page() -> Iterator[str]:
    yield "methods: the section of a recipe that maps methods to their options, as in"
    yield ""
    yield "  python -m trainer fit recipe=lora methods.lora.rank=8 methods.new_token=null"
    yield ""
    yield "null removes a method, {} keeps it with its defaults. There are:"
    yield ""
    for name, sentence in TABLES["methods"]():
        yield entry(name, sentence)
    yield ""
    yield "`help methods.<name>` prints the options of one."


def recipe_keys_page() -> Iterator[str]:
    from trainer.config.schema import SECTIONS

    yield "A recipe is a YAML file of these keys, which can also be given on the command line."
    yield ""
    yield entry("base", "another recipe, by name or file, that this one is laid over")
    yield entry("backbone", "the model that is trained: a name, a folder, a file, a finished run")
    yield entry("data", "the data source and its options")
    yield entry("methods", "what adapts the model, each with its options")
    for name, section in SECTIONS.items():
        yield entry(name, _line(section.__doc__))
    yield entry("tracker", "where losses are logged")
    yield entry("denoiser", "the shape of a network made from nothing")
    yield entry("families", "values of all these keys for a family of backbones, over the others")
    yield entry("backbones", "values of all these keys for single backbones, over those as well")
    yield ""
    yield "`help <key>` explains one, `help recipe.<name>` a recipe; `list recipes` prints all."


def base_page() -> Iterator[str]:
    yield "base: another recipe, by name or as a YAML file, that a recipe is laid over"
    yield ""
    yield from _paragraph(
        "It stands in a YAML file of your own, which then says only what differs, as in "
        "base: custom_diffusion. `list recipes` prints what there is."
    )


def families_page() -> Iterator[str]:
    from trainer.backbones.families import family_names

    yield "families: values for all backbones of a family, laid over a recipe's others"
    yield ""
    yield from _paragraph(
        "It stands in a YAML file and maps names of families to keys of a recipe, as in "
        "families: {sdxl: {run: {gradient_checkpointing: true}}}, for backbones of ours and for "
        "folders of yours. Options of a method that the recipe has not are passed over; backbones "
        f"comes above it. There are {', '.join(family_names())}."
    )


def overlays_page() -> Iterator[str]:
    yield "backbones: values for single backbones, laid over a recipe's others"
    yield ""
    yield from _paragraph(
        "It stands in a YAML file and maps names of backbones to keys of a recipe, as in "
        "backbones: {sd15: {optim: {lr: 1e-5}}}. `list backbones` prints what there is."
    )


def backbones_page() -> Iterator[str]:
    yield "backbone: the model that is trained, one of"
    yield ""
    for name, sentence in TABLES["backbones"]():
        yield entry(name, sentence)
    yield entry("<folder>", "a folder in diffusers layout, with model_index.json")
    yield entry("<file>", "a checkpoint of Stable Diffusion 1, 2 or XL in one .safetensors")
    yield entry("<run>", "a finished run or its adapter: its result is trained further")


def denoisers_page() -> Iterator[str]:
    from trainer.config.lineage import backbone_names, read_backbone

    made = [name for name in backbone_names() if "denoiser" in read_backbone(name)]
    yield f"denoiser: a network made from nothing, with backbone={' or '.join(made)}"
    for spec in denoiser_specs():
        yield ""
        yield from _paragraph(spec.__doc__)
        yield ""
        yield from _options_of(spec, "denoiser")


def trackers_page() -> Iterator[str]:
    from trainer.config.schema import TRACKERS

    yield f"tracker: where losses are logged: {', '.join(TRACKERS)}; default tensorboard"
    yield ""
    yield from _paragraph(
        "Beside the losses: learning rates, the norm of gradients, images a second, memory, "
        "previews and every option of the recipe; docs/tracking.md names them. metrics.jsonl in "
        "the run folder has the numbers in any case. wandb without a login is offline, and the end "
        "of the run prints the command that uploads it."
    )


def header_page(kind: str, name: str) -> Iterator[str]:
    """What a recipe or backbone says of itself at its head."""
    from trainer.common.declared import header_of
    from trainer.common.paths import BACKBONES, RECIPES

    path = (RECIPES if kind == "recipe" else BACKBONES) / f"{name}.yaml"
    yield f"{kind}={name}"
    yield ""
    yield from header_of(path)


def described(record: type[BaseModel], names: Iterable[str] | None = None, prefix: str = "") -> str:
    """Each option, or those of `names`, with its type and default, then its meaning."""
    from trainer.common.field_words import default_of, type_of
    from trainer.common.section import keys_of

    lines, fields = [], keys_of(record)
    for name in fields if names is None else names:
        field = fields[name]
        lines.append(entry(prefix + name, f"{type_of(field)}; {default_of(field)}"))
        meaning = textwrap.wrap(f"{field.description}.", WIDTH - INDENT)
        lines += [" " * INDENT + line for line in meaning]
    return "\n".join(lines)


def _options_of(record: type[BaseModel], key: str) -> Iterator[str]:
    yield f"Options, as in {key}.{next(iter(record.model_fields))}=...:"
    yield ""
    yield described(record)


def _paragraph(text: str | None) -> list[str]:
    return textwrap.wrap(_line(text), WIDTH)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
