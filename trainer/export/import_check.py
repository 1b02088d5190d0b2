"""Compares what was read of a file with what the loaders of other tools make of it, weight by
weight: peft and diffusers, which are installed, and LyCORIS where it is. ComfyUI and sd-scripts are
no packages, and a file that only they read is said to rest on this project's own rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export.apply_bundle import parts
from trainer.export.bundle import Bundle, FullDelta
from trainer.export.probe import LIMIT, NOISE
from trainer.export.real_loaders import Loader, loaders
from trainer.ops.adapters.inject import fold

# what a loader raises that does not know a file; diffusers' do not agree on one
UNREAD = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
NONE = (
    "no loader of a tool that reads such a file is installed; what was read rests on this "
    "project's own rules of the format"
)


@dataclass(frozen=True)
class Question:
    """A file that was read: its format, where it is, and what it adds by our reading."""

    format_name: str
    path: Path
    bundle: Bundle


@dataclass
class Verdict:
    """What a loader makes of the layers of a file: those alike, those it left out, and those that
    it gives another weight, with the difference and the whole change by our reading."""

    alike: int = 0
    largest: float = 0.0
    left_out: list[str] = field(default_factory=list)
    differing: dict[str, tuple[float, float]] = field(default_factory=dict)


def compare(question: Question, ours: Any, make_base: Callable[[], Any]) -> str:
    """What the loaders of other tools make of a file, in one line; the first that reads it as we do
    ends the search.

    ours: the base with what was read; make_base: makes a new copy of the base.

    Raises:
        ValueError: a loader reads the file, and none that does reads it as we do.
    """
    said: list[str] = []
    differs = False
    for loader in loaders(question.format_name, question.path, bundle=question.bundle, base=ours):
        base = make_base()
        before = _weights(base)
        try:
            loader.load(base)
        except UNREAD as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            said.append(f"{loader.name} does not read it ({reason[:120]})")
            continue
        verdict = _verdict(question.bundle, ours, base, before=before)
        line, ends = _line(loader, verdict)
        said.append(line)
        if ends:
            return "; ".join((line, *reversed(said[:-1])))
        differs = differs or bool(verdict.differing)
    if differs:
        raise ValueError(f"file={question.path}: {'; '.join(said)}; nothing was written")
    return "; ".join((*said, NONE))


def _line(loader: Loader, verdict: Verdict) -> tuple[str, bool]:
    """A verdict in words, and whether it confirms the reading."""
    if verdict.differing:
        path, (found, change) = next(iter(verdict.differing.items()))
        return (
            f"{loader.name} gives {len(verdict.differing)} layers other weights, such as {path}, "
            f"by {found:.1e}, where the file changes it by {change:.1e}{loader.known_fault}"
        ), False
    if not verdict.alike:
        return f"{loader.name} loads nothing of it", False
    read = f"{loader.name} makes the same weights of {verdict.alike} layers and words of the file"
    line = f"{read}: largest difference {verdict.largest:.1e} (allowed {LIMIT:.0e})"
    if verdict.left_out:
        line += f", and leaves out {len(verdict.left_out)}, such as {verdict.left_out[0]}"
    return line, True


@torch.no_grad()
def _verdict(bundle: Bundle, ours: Any, theirs: Any, *, before: Mapping[str, Tensor]) -> Verdict:
    for module in parts(theirs).values():
        fold(module)
    found = Verdict()
    own, other = _weights(ours), _weights(theirs)
    changed = {f"{path}.weight" for path in bundle.layers} | {
        f"{path}.bias"
        for path, delta in bundle.layers.items()
        if isinstance(delta, FullDelta) and delta.bias is not None
    }
    for name, old in before.items():
        if name in own and name in other and (name in changed or not torch.equal(other[name], old)):
            _judge(found, name, (own[name], other[name], old))
    for word, rows in bundle.tokens.items():
        for part, row in rows.items():
            number = theirs.tokenizers[part].get_added_vocab().get(word)
            if number is None:  # this loader reads no words
                continue
            table = theirs.text_encoders[part].get_input_embeddings().weight
            _judge(found, word, (row, table[number], torch.zeros_like(row)))
    return found


def _judge(found: Verdict, name: str, values: tuple[Tensor, Tensor, Tensor]) -> None:
    """Counts one weight; values: by our reading, by theirs, and before."""
    own, other, old = values
    change, gap = float((own - old).abs().max()), float((own - other).abs().max())
    if gap <= min(LIMIT, max(change / 10, NOISE)):
        found.alike += 1
        found.largest = max(found.largest, gap)
    elif float((other - old).abs().max()) <= NOISE:
        found.left_out.append(name)
    else:
        found.differing[name] = (gap, change)


def _weights(model: Any) -> dict[str, Tensor]:
    """Copies of all weights that files can change, by their names in the model."""
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in parts(model).items()
        for name, value in module.named_parameters()
        if "token_embedding" not in name
    }
