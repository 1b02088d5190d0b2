"""`help`: explains a verb, a section of a recipe, a method, a data source, or one option."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING

from trainer.cli.help_pages import (
    backbones_page,
    data_command_page,
    data_page,
    denoiser_specs,
    denoisers_page,
    described,
    header_page,
    method_page,
    methods_page,
    recipe_keys_page,
    section_page,
    source_page,
    trackers_page,
    verb_page,
)
from trainer.cli.usage import VERBS, usage
from trainer.common.exit_codes import BAD_RECIPE

if TYPE_CHECKING:
    from pydantic import BaseModel

Page = Callable[[], Iterator[str]]


def run(words: list[str]) -> int:
    """Prints the page of a topic, or of the option it names; without a topic, all verbs."""
    if not words:
        print(usage(), end="")
        return 0
    topic, pages = " ".join(words), _pages()
    page = pages.get(topic) or _option_page(topic)
    if page is None:
        hint = _nearest(topic, [*pages, *_options(topic.rpartition(".")[0])])
        print(f"error: help {topic}: no such topic; {hint}", file=sys.stderr)
        return BAD_RECIPE
    print("\n".join(page()))
    return 0


def _nearest(topic: str, known: list[str]) -> str:
    """What may have been meant: a topic that is spelt alike, or that ends alike, as methods.lora
    does for lora."""
    ends = [name.rpartition(".")[2] for name in known]
    near = get_close_matches(topic, known, n=1, cutoff=0.7) or get_close_matches(topic, ends, n=1)
    meant = [name for name, end in zip(known, ends, strict=True) if near and near[0] in (name, end)]
    return f"did you mean {' or '.join(meant)}?" if meant else "`help` alone lists them"


def _pages() -> dict[str, Page]:
    """Every topic but single options, by name."""
    from trainer.cli.data import COMMANDS
    from trainer.common.lookup import method_files, source_files
    from trainer.common.paths import BACKBONES, RECIPES
    from trainer.config.schema import SECTIONS

    pages: dict[str, Page] = {
        "recipe": recipe_keys_page,
        "backbone": backbones_page,
        "methods": methods_page,
        "data": data_page,
        "denoiser": denoisers_page,
        "tracker": trackers_page,
    }
    for verb in VERBS:
        pages.setdefault(verb, partial(verb_page, verb))
    for name in COMMANDS:
        pages[f"data {name}"] = partial(data_command_page, name)
    for name, section in SECTIONS.items():
        pages[name] = _both(pages.get(name), partial(section_page, name, section))
    for path in method_files():
        pages[f"methods.{path.stem}"] = partial(method_page, path.stem)
    for path in source_files():
        pages[f"data.{path.stem}"] = partial(source_page, path.stem)
    for kind, folder in (("recipe", RECIPES), ("backbone", BACKBONES)):
        for path in sorted(folder.glob("*.yaml")):
            pages[f"{kind}.{path.stem}"] = partial(header_page, kind, path.stem)
    return pages


def _both(first: Page | None, second: Page) -> Page:
    """A verb and a section of one name on one page."""
    if first is None:
        return second

    def page() -> Iterator[str]:
        yield from first()
        yield ""
        yield from second()

    return page


def _option_page(topic: str) -> Page | None:
    """The page of an option, as `run.steps` or `methods.lora.rank`; None if there is none."""
    found = _options(topic.rpartition(".")[0]).get(topic)
    if not found:
        return None

    def page() -> Iterator[str]:
        name = topic.rpartition(".")[2]
        for title, record in found:
            yield f"{topic} ({title})" if title else topic
            yield described(record, [name], prefix=topic.removesuffix(name))

    return page


def _options(home: str) -> dict[str, list[tuple[str, type[BaseModel]]]]:
    """The options below a topic, with the records that have them. A `data.` or `denoiser.` option
    may be of several, which the title then names."""
    records = list(_records(home))
    found: dict[str, list[tuple[str, type[BaseModel]]]] = {}
    for title, record in records:
        for name in record.model_fields:
            found.setdefault(f"{home}.{name}", []).append((title, record))
    return found


def _records(home: str) -> Iterator[tuple[str, type[BaseModel]]]:
    from trainer.config.schema import SECTIONS
    from trainer.data.source import Source
    from trainer.methods.apply import find_method, method_names

    kind, _, name = home.partition(".")
    if home in SECTIONS:
        yield "", SECTIONS[home]
    elif kind == "methods" and name in method_names():
        yield "", find_method(name)
    elif kind == "data" and (name in Source.names() or not name):
        for source in [name] if name else Source.names():
            yield f"source {source}", Source.find(source)
    elif home == "denoiser":
        yield from ((made.__name__, made) for made in denoiser_specs())
