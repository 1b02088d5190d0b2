"""Proves written files: every reader of their format must make the model that was exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.export.find_format import find_format
from trainer.export.printed_call import code_of, model_of, places, run_call
from trainer.export.probe import LIMIT, NOISE, Probe, Say, difference


@dataclass(frozen=True)
class Proof:
    """What the written files are compared with.

    make_base: makes a new copy of the plain base; wanted: the adapted model's answer to `probe`;
    say: receives each line for the user; tree: the adapter's recipe; whole: whether the call of the
    README gives the model, on a base stored as it is published; dropped: the adapter's tensors that
    the format has no place for; others: which other formats carry the adapter, as a clause.
    """

    format_name: str
    make_base: Callable[[], Any]
    probe: Probe
    wanted: Tensor
    say: Say
    tree: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = True
    dropped: tuple[str, ...] = ()
    others: str = ""

    def allowed(self, effect: float) -> float:
        """The largest difference allowed of files whose adapter makes an effect of this size."""
        return min(LIMIT, max(effect / 10, NOISE))


def prove(proof: Proof, folder: Path) -> float:
    """Checks that every reader of the format makes the adapted model of the files in `folder`.
    Returns the effect of the adapter: how much the model's output differs from the base's.

    An adapter with a small effect must be met within a tenth of its effect, so that a file which
    loads and does nothing never passes.

    Raises:
        ValueError: a reader fails, or its model's output differs by more than is allowed.
    """
    name = proof.format_name
    base = proof.make_base()
    effect = difference(proof.probe(base), proof.wanted)
    allowed = proof.allowed(effect)
    for number, (reader, load) in enumerate(find_format(name).readers.items()):
        if number:  # a reader edits the base that it is given
            base = proof.make_base()
        try:
            model = load(folder, base)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"format={name}: {reader} does not read the file: {error}") from error
        if model is None:
            continue
        found = difference(proof.probe(model), proof.wanted)
        if found > allowed:
            raise ValueError(_unlike(proof, reader, found, allowed=allowed))
        proof.say(
            f"{name}, read back by {reader}: largest difference {found:.1e} (allowed "
            f"{allowed:.0e}; the adapter itself makes {effect:.1e})"
        )
    return effect


def _unlike(proof: Proof, reader: str, found: float, *, allowed: float) -> str:
    dropped = proof.dropped
    also = f"; it has no place for {dropped[0]}, {len(dropped)} tensors" if dropped else ""
    return (
        f"format={proof.format_name} cannot carry this adapter: read back by {reader}, the output "
        f"differs by {found:.1e} from the model's, and {allowed:.0e} is allowed{also}; nothing was "
        f"written{f'; {proof.others}' if proof.others else ''}"
    )


def prove_printed_call(proof: Proof, folder: Path, *, effect: float, exact: bool) -> None:
    """Runs the python call that the README in `folder` prints, to a picture, and asks the pipeline
    it makes as `prove` does; nothing where it prints none.

    effect: of the adapter, see `prove`; exact: whether the files were not rounded, so that the
    difference is limited; where the call does not give the whole model it is not, see
    `Proof.whole`.

    Raises:
        ValueError: the call fails, its picture is of one colour, or the output differs by more than
            is allowed.
    """
    code = code_of(folder)
    if code is None:
        return
    base = proof.make_base()
    with places(proof.tree, base, proof.probe.placement.device) as settings:
        names = run_call(code, {"folder": str(folder.absolute()), **settings})
    found = difference(proof.probe(model_of(names["pipe"], base)), proof.wanted)
    allowed = proof.allowed(effect)
    if exact and proof.whole and found > allowed:
        raise ValueError(_unlike(proof, "the call in README.md", found, allowed=allowed))
    differs = f"largest difference {found:.1e}"
    if not proof.whole:
        differs = f"it differs by {found:.1e}, on the plain backbone or by what it does not read"
    proof.say(f"the call in README.md gives a picture; {differs}")


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
