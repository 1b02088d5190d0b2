"""The options of `edit`, and those that a recipe of `recipes/edit` gives for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from trainer.cli.options import Count, Options, SeedNumber
from trainer.cli.sample_partners import as_folder
from trainer.common.field_words import Called
from trainer.common.paths import RECIPES
from trainer.common.section import keys_of
from trainer.common.suggest import nearest
from trainer.config.run_section import Device, Precision
from trainer.config.schema import RecipeError
from trainer.config.tree import merge_trees, read_yaml
from trainer.config.unknown_keys import refuse_unknown

EDITS = RECIPES / "edit"
# what is edited: a recipe's own is an example, which another of the first three replaces whole
SUBJECT = ("image", "source", "prompt", "mask", "target_mask", "reference")
CHANGE = re.compile(r"\[([^][]*?)->([^][]*?)\]")  # [cat->dog], or [cat->dog|fox]


def _is_there(path: Path) -> Path:
    if not path.expanduser().is_file():
        raise ValueError("no such file; give the path of a PNG, JPEG or WebP")
    return path


Picture = Annotated[Path, AfterValidator(_is_there), Called("path")]


class EditOptions(Options):
    """Writes a sheet of the source, what it was generated as again, the edits, the masks and maps
    that were used, each edit as a PNG, and a JSON with all that is needed to repeat it, and prints
    their paths. recipe or method is needed, or from."""

    recipe: str | None = Field(
        None,
        description="a recipe of recipes/edit by its name, or a YAML file of yours: options of "
        "edit, over which those given here go",
        examples=["p2p"],
    )
    method: str | None = Field(None, description="another word for recipe, as in method=masactrl")
    image: Picture | None = Field(
        None,
        description="a picture to edit, scaled and cut to size; null generates one from source",
    )
    source: str | None = Field(None, description="what the picture to edit shows, as a prompt")
    prompt: str | tuple[str, ...] | None = Field(
        None,
        description="what the edit shows; a list of several, as in ['a dog', 'a fox']; or source "
        "and edit in one, as in a [cat->dog] or a [cat->dog|fox]",
        examples=['"a [cat->dog] on a red background"'],
    )
    mask: Picture | None = Field(
        None,
        description="for methods that read one: a grey picture of image's size, white where the "
        "object is that is edited",
    )
    target_mask: Picture | None = Field(
        None, description="likewise: where it is in the edit; null takes mask"
    )
    reference: Picture | None = Field(
        None, description="for methods that put one into image: a second picture of that size"
    )
    between: Count | None = Field(
        None, description="for methods that interpolate: pictures between the two of prompt"
    )
    seed: SeedNumber = Field(0, description="of the noise of a source that is generated")
    steps: Count = Field(50, description="of the sampler, and of the inversion")
    guidance: float = Field(7.5, description="strength of classifier-free guidance, 1 for none")
    negative: str = Field("", description="a prompt to move away from, in place of the empty one")
    size: Count | None = Field(
        None, ge=16, description="side of the picture in pixels; null for the backbone's own"
    )
    backbone: str | None = Field(
        None, description="by name or folder; beside an adapter, what it is loaded over"
    )
    adapter: Path | None = Field(
        None, description="a trained adapter, as of `sample`: an edit of a personalised model"
    )
    scale: float = Field(1.0, description="strength of the adapter, 0 for the base")
    methods: dict[str, Any] | None = Field(
        None,
        description="options of the recipe's method, as in methods.p2p.blend=true, and further "
        "methods that train nothing",
    )
    maps: bool = Field(True, description="show the attention maps of the words that differ")
    from_: Path | None = Field(
        None,
        alias="from",
        description="the JSON or the sheet of an earlier edit, which is made again, bit for bit; "
        "other options replace its own",
    )
    out: Path = Field(Path("edits"), description="folder to write into")
    device: Device = "auto"
    precision: Precision = "auto"

    @field_validator("out")
    @classmethod
    def _is_a_folder(cls, out: Path) -> Path:
        return as_folder(out)

    @model_validator(mode="after")
    def _agree(self) -> EditOptions:
        if not self.prompts:
            raise ValueError('prompt is missing, as in prompt="a [cat->dog] on a red background"')
        if self.target_mask is not None and self.mask is None:
            raise ValueError("target_mask= is beside mask=, which is of the source; give that too")
        if self.between is not None and len(self.prompts) != 2:
            raise ValueError("between= is for two prompts, as in prompt=['a fox', 'a cat']")
        if self.adapter is None and self.backbone is None:
            raise ValueError("give backbone=<name or folder>, or adapter=<file or run folder>")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        if self.prompt is None or isinstance(self.prompt, tuple):
            return self.prompt or ()
        return (self.prompt,)


def edit_recipes() -> list[str]:
    return sorted(path.stem for path in EDITS.glob("*.yaml"))


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, over those of the recipe they name; prompts in brackets are taken apart.

    Raises:
        RecipeError: no recipe, one that there is not, or one of other keys.
    """
    words = dict(given)
    named = [str(words.pop(key)) for key in ("recipe", "method") if key in words]
    if len(named) != 1:
        why = "give recipe or method, not both" if named else "recipe=<name> is missing"
        raise RecipeError(f"{why}; recipes of edit: {', '.join(edit_recipes())}")
    own = read_yaml(_file_of(named[0]))
    refuse_unknown(own, keys_of(EditOptions), "")
    words = _taken_apart(words)
    if set(SUBJECT[:3]) & set(words):
        own = {key: value for key, value in own.items() if key not in SUBJECT}
    if "adapter" in words and "backbone" not in words:
        own.pop("backbone", None)
    return merge_trees(_taken_apart(own), words)


def _file_of(name: str) -> Path:
    if name in edit_recipes():
        return EDITS / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        near = nearest(path.stem, edit_recipes())
        raise RecipeError(f"recipe={name}: there is no such recipe of edit{near}")
    return path


def _taken_apart(words: Mapping[str, Any]) -> dict[str, Any]:
    """`a [cat->dog|fox] left of a tree` as its source and its edits."""
    found, prompt = dict(words), words.get("prompt")
    given = prompt if isinstance(prompt, list | tuple) else [prompt]
    alone = given is prompt and len(given) == 1
    texts = [_in_brackets(text, alone) for text in given if isinstance(text, str)]
    if not any(CHANGE.search(text) for text in texts):
        return found
    if "source" in words:
        raise RecipeError(
            "source and a prompt with [old->new] both say what the source shows; leave one out"
        )
    sources = {CHANGE.sub(r"\1", text) for text in texts}
    if len(sources) > 1:
        raise RecipeError(
            f"the prompts say of the source that it shows {' and '.join(sorted(sources))}; edits "
            "that are made at once have one source"
        )
    found["source"] = " ".join(sources.pop().split())
    found["prompt"] = tuple(each for text in texts for each in _edits_of(text))
    return found


def _in_brackets(text: str, alone: bool) -> str:
    """The text. alone: it is a list's only one, as a word `prompt=[cat->dog]` reads: the brackets
    are put back. Raises RecipeError for an arrow that is in none."""
    if "->" not in CHANGE.sub("", text):
        return text
    if alone and CHANGE.fullmatch(whole := f"[{text}]"):
        return whole
    raise RecipeError(
        f"prompt={text!r}: the arrow -> stands in brackets around the words that change, as in a "
        "[cat->dog] on a bed"
    )


def _edits_of(text: str) -> list[str]:
    """The edits of one text: of several with | the first of each bracket, then the second."""
    counts = {len(new.split("|")) for _, new in CHANGE.findall(text)} - {1}
    if len(counts) > 1:
        raise RecipeError(
            f"prompt={text!r}: brackets with | have as many parts each, one for every edit"
        )

    def of(number: int) -> str:
        def chosen(change: re.Match[str]) -> str:
            parts = change[2].split("|")
            return parts[number] if len(parts) > 1 else parts[0]

        return " ".join(CHANGE.sub(chosen, text).split())

    return [of(number) for number in range(counts.pop() if counts else 1)]
