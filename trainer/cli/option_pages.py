"""Pages of `help` about single options: where each option is, by any name that a user types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.cli.help_pages import command_records, denoiser_specs, described

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Page = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Home:
    """A record with options. key: what their names follow in a recipe, as `run`; empty for the
    options of a command. title: of what they are options, where the key does not say it."""

    record: type[BaseModel]
    key: str
    title: str = ""

    @property
    def options(self) -> dict[str, FieldInfo]:
        """By their names."""
        from trainer.common.section import keys_of

        return keys_of(self.record)


def option_page(topic: str) -> Page | None:
    """The page of an option: `run.steps`, `methods.lora.rank`, `sample.prompt`, or just `rank`, of
    all that are called so; of an entry in a mapping, as `optim.lrs.lora`, that of the mapping. None
    if there is none."""
    home, _, name = topic.rpartition(".")
    found = [each for each in homes(home) if name in each.options]
    if not found:
        return _page_of_mapping(home)

    def page() -> Iterator[str]:
        for each in found:
            full = f"{each.key}.{name}" if each.key else name
            yield f"{full} ({each.title})" if each.title else full
            yield described(each.record, [name], prefix=full.removesuffix(name))

    return page


def _page_of_mapping(topic: str) -> Page | None:
    from trainer.common.field_words import type_of

    home, _, name = topic.rpartition(".")
    if not home:
        return None
    fields = [own[name] for h in homes(home) if name in (own := h.options)]
    return option_page(topic) if any("mapping of" in type_of(field) for field in fields) else None


def option_names(home: str = "") -> list[str]:
    """The options below a topic with their full names; without one those of all, by their own."""
    start = f"{home}." if home else ""
    return list(dict.fromkeys(start + name for h in homes(home) for name in h.options))


def homes(topic: str) -> list[Home]:
    """The records that have the options below a topic, as `run` or `methods.lora`: an option of
    `data`, `denoiser` or a verb may be of several. Without a topic all records."""
    from trainer.data.source import Source
    from trainer.methods.apply import find_method, method_names

    kind, _, name = topic.partition(".")
    found = list(_sections(topic))
    for method in method_names():
        if topic in ("", f"methods.{method}"):
            found.append(Home(find_method(method), f"methods.{method}"))
    if topic in ("", "data") or (kind == "data" and name in Source.names()):
        sources = [name] if name else Source.names()
        found += [Home(Source.find(each), "data", f"source {each}") for each in sources]
    if topic in ("", "denoiser"):
        found += [Home(spec, "denoiser", spec.__name__) for spec in denoiser_specs()]
    return [*found, *_commands(topic)]


def _sections(topic: str) -> Iterator[Home]:
    from trainer.config.schema import SECTIONS

    for name, section in SECTIONS.items():
        if topic in ("", name):
            yield Home(section, name)


def _commands(topic: str) -> Iterator[Home]:
    """The verbs, and the commands of `data`."""
    for command, record in command_records().items():
        if topic in ("", command):
            yield Home(record, "", f"option of {command}")
