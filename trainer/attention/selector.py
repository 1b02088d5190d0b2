"""A selector names attention sites in one line of YAML, e.g. `cross & !mid | name:*blocks.0*attn1`.

    selector    = alternative { "|" alternative }
    alternative = term { "&" term }
    term        = [ "!" ] ( kind | place | grid | "depth>=" share | "name:" glob )
    kind        = "self" | "cross" | "joint" | "temporal" | "all"
    place       = "down" | "mid" | "up" | "block"
    grid        = "/" divisor          token grid relative to the latent: /1 is its full resolution
    share       = 0 to 1               place in forward order: 0 the first layer, 1 the last

`joint` is attention of image and text to each other in one sequence; where some blocks have one
stream of both, `name:single*` chooses these. Temporal sites match only alternatives that contain
`temporal` or `name:...`: a method written for images and pointed at `all` must not reach into the
motion of a video model. `all` means all spatial sites. This file imports nothing heavy, so a recipe
is checked before torch is loaded.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

KINDS = ("self", "cross", "joint", "temporal", "all")
PLACES = ("down", "mid", "up", "block")
FORMS = (*KINDS, *PLACES, "/1", "/2", "depth>=0.5", "name:<glob>")
DEEP = "depth>="


class Selectable(Protocol):
    """What a selector reads of a site; `sites.Site` has these."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def divisor(self) -> int | None: ...
    @property
    def depth(self) -> float: ...


@dataclass(frozen=True)
class Term:
    """One condition on a site, e.g. `!mid`."""

    aspect: Literal["kind", "place", "grid", "depth", "name"]
    value: str
    negated: bool = False

    def matches(self, site: Selectable) -> bool:
        return self._holds(site) != self.negated

    @property
    def admits_temporal(self) -> bool:
        asks_temporal = self.aspect == "kind" and self.value == "temporal"
        return not self.negated and (asks_temporal or self.aspect == "name")

    def _holds(self, site: Selectable) -> bool:
        if self.aspect == "kind":
            return self.value in ("all", site.kind)
        if self.aspect == "place":
            return self.value == site.place
        if self.aspect == "grid":
            return site.divisor == int(self.value)
        if self.aspect == "depth":
            return site.depth >= float(self.value)
        return fnmatchcase(site.name, self.value)


@dataclass(frozen=True)
class Selector:
    """Alternatives of conjunctions, as read from `text`."""

    text: str
    alternatives: tuple[tuple[Term, ...], ...]

    def matches(self, site: Selectable) -> bool:
        return any(_matches(terms, site) for terms in self.alternatives)


def parse_selector(text: str) -> Selector:
    """Reads a selector; an unknown term is a `ValueError` that names the nearest right one."""
    alternatives = tuple(
        tuple(_parse_term(term.strip(), text) for term in alternative.split("&"))
        for alternative in text.split("|")
    )
    return Selector(text, alternatives)


def _matches(terms: tuple[Term, ...], site: Selectable) -> bool:
    if site.kind == "temporal" and not any(term.admits_temporal for term in terms):
        return False
    return all(term.matches(site) for term in terms)


def _parse_term(term: str, text: str) -> Term:
    negated = term.startswith("!")
    word = term[1:].strip() if negated else term
    if word in KINDS:
        return Term("kind", word, negated)
    if word in PLACES:
        return Term("place", word, negated)
    if word.startswith("/") and word[1:].isdecimal() and int(word[1:]) > 0:
        return Term("grid", word[1:], negated)
    if word.startswith(DEEP) and _is_share(word.removeprefix(DEEP).strip()):
        return Term("depth", word.removeprefix(DEEP).strip(), negated)
    if word.startswith("name:") and word[5:].strip():
        return Term("name", word[5:].strip(), negated)
    raise ValueError(_unknown(word, text))


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _unknown(word: str, text: str) -> str:
    if not word:
        return f"selector {text!r} has an empty term; terms are {', '.join(FORMS)}"
    nearest = difflib.get_close_matches(word, FORMS, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ";"
    return f"selector {text!r}: unknown term {word!r}{hint} terms are {', '.join(FORMS)}"
