"""`help`: explains a verb, a section of a recipe, a method, a data source, or one option.

What other trainers call an option is explained as well, see `config/synonyms.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial

from trainer.cli.help_pages import (
    backbones_page,
    base_page,
    command_page,
    data_page,
    denoisers_page,
    families_page,
    header_page,
    method_page,
    methods_page,
    overlays_page,
    recipe_keys_page,
    section_page,
    source_page,
    trackers_page,
    verb_page,
)
from trainer.cli.option_pages import Page, homes, option_names, option_page
from trainer.cli.usage import VERBS, usage
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.program import as_started


def run(words: list[str]) -> int:
    """Prints the page of a topic, or of the option it names; without a topic, all verbs."""
    if not words:
        print(as_started(usage()), end="")
        return 0
    topic, pages = " ".join(words), _pages()
    for spelling in _spellings(topic):
        page = pages.get(spelling) or option_page(spelling) or _synonym_page(spelling, pages)
        if page is not None:
            print(as_started("\n".join(page())))
            return 0
    home = _spellings(topic)[-1].rpartition(".")[0]
    hint = _nearest(topic, [*pages, *(option_names(home) if home else ())])
    print(f"error: help {topic}: no such topic; {hint}", file=sys.stderr)
    return BAD_RECIPE


def topics() -> list[str]:
    """What `help` explains: every page, and every option by its key in a recipe."""
    keys = [f"{home.key}.{name}" for home in homes("") for name in home.options]
    return list(dict.fromkeys([*_pages(), *(key for key in keys if not key.startswith("."))]))


def _spellings(topic: str) -> list[str]:
    """A topic as it stands; as `sample prompt` is `sample.prompt`; as `recipe=lora` is
    `recipe.lora`; and without a value, as in `run.steps=400`."""
    words = [topic, ".".join(topic.rsplit(" ", 1)), topic.replace("=", ".", 1)]
    return list(dict.fromkeys([*words, topic.partition("=")[0]]))


def _synonym_page(topic: str, pages: dict[str, Page]) -> Page | None:
    """What other trainers call so."""
    from trainer.config.synonyms import synonym_targets

    name = topic.rpartition(".")[2]
    targets = [each for each in synonym_targets(name) if "." in each or each in pages]
    found = [pages.get(each) or option_page(each) for each in targets or synonym_targets(name)]
    if not found:
        return None

    def page() -> Iterator[str]:
        yield f"{name} is called {' or '.join(synonym_targets(name))} here"
        for each in filter(None, found):
            yield ""
            yield from each()

    return page


def _nearest(topic: str, known: list[str]) -> str:
    """What may have been meant: a topic that is spelt alike, or that ends alike, as methods.lora
    does for lora; or an option."""
    ends = [name.rpartition(".")[2] for name in known]
    near = get_close_matches(topic, known, n=1, cutoff=0.7) or get_close_matches(topic, ends, n=1)
    meant = [name for name, end in zip(known, ends, strict=True) if near and near[0] in (name, end)]
    meant = meant or get_close_matches(topic, option_names(), n=1)
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
        "data.source": data_page,
        "tracker": trackers_page,
        "base": base_page,
        "families": families_page,
        "backbones": overlays_page,
    }
    for verb in VERBS:
        pages.setdefault(verb, partial(verb_page, verb))
    for name in COMMANDS:
        pages[f"data {name}"] = partial(command_page, f"data {name}")
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
