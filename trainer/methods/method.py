"""What a method is: a frozen record of options whose `apply` edits a model and returns an
`Edit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trainer.attention.given_frames import GivenFrames
    from trainer.attention.hooks import SamplingHook
    from trainer.attention.model import AttentionModel
    from trainer.attention.step_result import StepResult


@dataclass(frozen=True)
class Calibration:
    """How a method finds, once for a backbone, what it is to do while sampling. hook: runs at each
    step of a sampler on a few pictures; result: then writes what was found to a path and returns a
    sentence about it."""

    hook: SamplingHook
    result: Callable[[Path], str]


ORDER = ("structure", "attention", "storage", "adapt", "select")


@dataclass(frozen=True)
class Edit:
    """What one method did to a model.

    sites: names of the attention sites it touched. claims: `(module or parameter path, aspect)` no
    other method may claim. trains: names of the parameters it trains. keeps: names of frozen
    tensors the base cannot give back, stored beside the trained ones. loss: an extra term added to
    the objective, from what the step found out. schedule: called before every training step with
    the share of the run's steps that is done, from 0. at_step: called before every training step
    with its number, from 0. check_new_run: raises ValueError where a new run cannot start so; an
    adapter that is loaded, or a run that is resumed, is not asked. prepare: called once before the
    first step of a new run with a function that runs a few training batches forward, for starts
    that look at the data. finish: called with the same function once after the last step, before
    the adapter is stored, for what is kept about the data. sampling: what it does while pictures or
    clips are sampled, in order; see `attention/hooks.py`. given: where the frames of a clip are
    that is given to the model, which makes the complete one. report: what really ran at each site
    so far, by its name; asked once, after the first training batch. calibration: how
    `calibrate` finds what the method reads from a file.
    """

    sites: tuple[str, ...] = ()
    claims: tuple[tuple[str, str], ...] = ()
    trains: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    loss: Callable[[StepResult], Tensor] | None = None
    schedule: Callable[[float], None] | None = None
    at_step: Callable[[int], None] | None = None
    check_new_run: Callable[[], None] | None = None
    prepare: Callable[[Callable[[], None]], None] | None = None
    finish: Callable[[Callable[[], None]], None] | None = None
    sampling: tuple[SamplingHook, ...] = ()
    given: GivenFrames | None = None
    report: Callable[[], Mapping[str, Sequence[str]]] | None = None
    calibration: Calibration | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the tensors that an adapter holds of it."""
        return (*self.trains, *self.keeps)

    def renamed(self, names: Mapping[str, str]) -> Edit:
        """With new names of its tensors that a later method has moved, old name to new."""
        own = {name: names.get(name, name) for name in self.stored}
        return replace(
            self,
            claims=tuple((own.get(thing, thing), aspect) for thing, aspect in self.claims),
            trains=tuple(own[name] for name in self.trains),
            keeps=tuple(own[name] for name in self.keeps),
        )

    def frozen(self) -> Edit:
        """With all that trains kept as it is instead."""
        return replace(self, trains=(), keeps=self.stored, prepare=None)


Use = Literal["train", "optimise", "sample"]
EditKind = Literal["structure", "attention", "storage", "adapt", "select"]


class Method(BaseModel):
    """Options of a method and the one thing it can do. Subclasses are frozen records; importing one
    loads no torch.

    Each file declares beside its options what `list` and `help` print of it: kind, when it is
    applied, see `ORDER`; systems, the published systems it makes, by their names; paper, where it
    is described, empty for none; use, where it is not for training. The first sentence
    of the file is its summary. `list` reads all of it as text (`trainer/common/declared.py`), so
    they are plain strings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[EditKind]
    systems: ClassVar[str]
    paper: ClassVar[str]
    # train: it takes part in training; sample: it acts while pictures are sampled alone; optimise:
    # it optimises something of each picture while that is sampled
    use: ClassVar[Use] = "train"
    adds_words: ClassVar[bool] = False  # to the vocabulary, as its option `tokens` names them
    inflates: ClassVar[bool] = False  # makes clips with a model of pictures, frames as its rows
    calibrates: ClassVar[bool] = False  # `calibrate` finds what it does, see `Calibration`
    # options of sampling alone, which `sample` takes anew beside a trained adapter
    when_sampling: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        """The name of its file, by which recipes call it and under which it owns what it adds."""
        return type(self).__module__.rpartition(".")[2]

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, each with what it needs."""
        return {}

    @property
    def words(self) -> tuple[str, ...]:
        """The words it adds to the vocabulary."""
        return ()

    @property
    def trained_words(self) -> tuple[str, ...]:
        """Those of `words` that this run trains; empty for all."""
        return ()

    @property
    def known_words(self) -> tuple[str, ...]:
        """The words of the vocabulary that it trains."""
        return ()

    @property
    def reads_weights(self) -> bool:
        """Whether `apply` calculates with values of the base's layers, which are then in fp32 and
        take twice the memory of half precision; `tests/methods/test_half_precision_base.py` finds
        a method that does and does not say it."""
        return False

    @property
    def linear(self) -> bool:
        """Whether all it does is to add a dW to weights of the base, which `scale` can multiply, to
        add words, or to store the base in another way. One that changes how the network computes
        is not."""
        return False

    def apply(self, model: AttentionModel) -> Edit:
        """Edits `model` in place. Raises ValueError where nothing matches."""
        raise NotImplementedError
