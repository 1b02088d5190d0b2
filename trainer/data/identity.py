"""What the samples of a run are, by name: digests of their pictures or clips, and of their
captions. A checkpoint keeps them, so that a resumed run notices what was changed meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.data.source import Dataset

LETTERS = 16  # of a digest, 64 bits
HELD_OUT = "held out: "
TIMES = "x"  # before a number of repeats; no digit of a digest

Identity = dict[str, str]


def identity_of(train: Dataset, held_out: Dataset | None) -> Identity:
    """The identities of the training samples, in order, and of the held-out ones."""
    found = dict(train.identity())
    if held_out is not None:
        found |= {f"{HELD_OUT}{name}": value for name, value in held_out.identity().items()}
    return found


def by_name(rows: Iterable[tuple[str, str]]) -> Identity:
    """(name, identity) of every sample as a mapping; a name that occurs again gets a number."""
    found: Identity = {}
    for name, value in rows:
        own, number = name, 1
        while own in found:
            number += 1
            own = f"{name} ({number})"
        found[own] = value
    return found


def captioned(
    picture: str, captions: Sequence[str], mask: str | None = None, *, repeats: int = 1
) -> str:
    """The identity of a sample from those of its picture and its mask, its captions, and how often
    an epoch has it."""
    parts = [picture[:LETTERS], digest_of(*captions)]
    parts += [] if mask is None else [mask[:LETTERS]]
    return " ".join(parts if repeats == 1 else [*parts, f"{TIMES}{repeats}"])


def digest_of(*texts: str) -> str:
    """A short digest of texts, which changes when letters move from one to the next."""
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:LETTERS]


def sha256_of_file(path: Path) -> str:
    """Of a file's bytes; computed once while its size and time of change stay."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_samples(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A few words for each sample that differs; empty where nothing does."""
    gone = [f"{name} is gone" for name in before if name not in now]
    new = [f"{name} is new" for name in now if name not in before]
    changed = [
        _how(name, before[name], value)
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    if not (gone or new or changed) and list(before) != list(now):
        return ["the order of the samples is another one"]
    return [*changed, *new, *gone]


def _parts(value: str) -> tuple[list[str], str]:
    """The digests of an identity, empty ones behind them, and its repeats."""
    digests, _, times = value.partition(f" {TIMES}")
    return [*digests.split(" "), "", ""], times or "1"


def _how(name: str, before: str, now: str) -> str:
    (had, often), (has, oftener) = map(_parts, (before, now))
    if had == has and often != oftener:
        return f"{name} is in an epoch {oftener} times and was {often} times"
    if not (had[1] and has[1]):
        return f"{name} has changed"
    if had[0] != has[0]:
        return f"{name} was rewritten"
    return f"the {'caption' if had[1] != has[1] else 'mask'} of {name} has changed"
