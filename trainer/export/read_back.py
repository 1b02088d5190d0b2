"""Proves written files: every reader of their format must make the model that was exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.export.find_format import find_format
from trainer.export.proof import LIMIT, NOISE, Probe, Say, difference


@dataclass(frozen=True)
class Proof:
    """What the written files are compared with.

    make_base: makes a new copy of the plain base; wanted: the adapted model's answer to `probe`;
    say: receives each line for the user.
    """

    format_name: str
    make_base: Callable[[], Any]
    probe: Probe
    wanted: Tensor
    say: Say


def prove(proof: Proof, folder: Path, dropped: Sequence[str] = ()) -> None:
    """Checks that every reader of the format makes the adapted model of the files in `folder`.

    An adapter with a small effect must be met within a tenth of its effect, so that a file which
    loads and does nothing never passes.

    dropped: the adapter's tensors that the format has no place for.

    Raises:
        ValueError: a reader fails, or its model's output differs by more than is allowed.
    """
    name = proof.format_name
    for reader, load in find_format(name).readers.items():
        base = proof.make_base()
        effect = difference(proof.probe(base), proof.wanted)
        allowed = min(LIMIT, max(effect / 10, NOISE))
        try:
            model = load(folder, base)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"format={name}: {reader} does not read the file: {error}") from error
        if model is None:
            continue
        found = difference(proof.probe(model), proof.wanted)
        if found > allowed:
            also = f"; it has no place for {dropped[0]}, {len(dropped)} tensors" if dropped else ""
            raise ValueError(
                f"format={name} cannot carry this adapter: read back by {reader}, the output "
                f"differs by {found:.1e} from the model's, and {allowed:.0e} is allowed{also}; "
                "nothing was written. format=merged folds everything into the weights"
            )
        proof.say(
            f"{name}, read back by {reader}: largest difference {found:.1e} (allowed "
            f"{allowed:.0e}; the adapter itself makes {effect:.1e})"
        )


def measure_rounding(proof: Proof, folder: Path, dtype: str) -> None:
    """Reports how much the output changes by the rounding of the files in `folder` to `dtype`.

    Raises:
        ValueError: values are beyond the range of the dtype.
    """
    readers = find_format(proof.format_name).readers.items()
    read = ((reader, load(folder, proof.make_base())) for reader, load in readers)
    reader, model = next((reader, model) for reader, model in read if model is not None)
    found = difference(proof.probe(model), proof.wanted)
    if found == float("inf"):
        raise ValueError(f"dtype={dtype}: some values are beyond its range; use dtype=bfloat16")
    proof.say(f"rounded to {dtype}, read back by {reader}: largest difference {found:.1e}")
