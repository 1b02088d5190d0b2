"""Applies the methods of a recipe to a model, in order, and refuses those that cannot share it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trainer.attention.errors import TakenError
from trainer.common.lookup import method_files, only_class
from trainer.methods.method import ORDER, Edit, Method

if TYPE_CHECKING:
    from torch.nn import Parameter

    from trainer.attention.model import AttentionModel


@dataclass(frozen=True)
class Plan:
    """What applying a recipe's methods did; edits in the order they were applied.

    trained, total: how many values train, and how many the model has, those stored in 4 bits too.
    """

    edits: Mapping[str, Edit]
    trained: int
    total: int
    trained_bytes: int
    names: tuple[str, ...] = field(default=(), repr=False)
    keeps: tuple[str, ...] = field(default=(), repr=False)

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the tensors an adapter holds: all that train, and all the base does not have."""
        return (*self.names, *self.keeps)

    def started(self, tensors: Collection[str]) -> Plan:
        """Where these tensors have values of an earlier run: an edit whose trained tensors are
        among them has no `prepare`, nor a start to check."""
        edits = {
            name: replace(edit, prepare=None, check_new_run=None)
            if edit.trains and set(edit.trains) <= set(tensors)
            else edit
            for name, edit in self.edits.items()
        }
        return replace(self, edits=edits)


def method_names() -> list[str]:
    """Every method there is, by file name."""
    return [path.stem for path in method_files()]


def find_method(name: str) -> type[Method]:
    """The class in the file called `name`: its one subclass of `Method`."""
    path = next(path for path in method_files() if path.stem == name)
    found: type[Method] = only_class(f"trainer.methods.{path.parent.name}.{name}", Method)
    return found


def in_order(methods: Mapping[str, Method]) -> dict[str, Method]:
    """The order in which they are applied: by `ORDER`, then as the recipe lists them."""
    return dict(sorted(methods.items(), key=lambda item: ORDER.index(item[1].kind)))


def apply_methods(
    model: AttentionModel,
    methods: Mapping[str, Method],
    seed: int = 0,
    trains: bool = True,
    frozen: Collection[str] = (),
    *,
    over: Mapping[str, Edit] | None = None,
) -> Plan:
    """Freezes the model, applies the methods in the order of `ORDER`, and marks what trains.

    The random numbers of a method depend on `seed` and on its own name, not on the methods before
    it. trains: False for a model that is used as it is, where nothing may be left to train. frozen:
    names of methods whose tensors stay as they are, and are stored. over: edits that were applied
    before, whose claims hold.

    Raises:
        ValueError: two methods claim the same thing, a method matches nothing, or nothing trains,
        or something does without `trains`.
    """
    edits: dict[str, Edit] = {}
    for name, method in in_order(methods).items():
        before = dict(model.named_parameters())
        edit = _apply(model, name, method, seed=seed, earlier={*(over or {}), *edits})
        if moved := _moved(before, model):
            edits = {other: earlier.renamed(moved) for other, earlier in edits.items()}
        _check_claims({**(over or {}), **edits}, name, edit)
        edits[name] = edit
        if edit.sampling:
            of_earlier_runs = model.sampling_hooks.get(name, ())
            model.sampling_hooks[name] = (*of_earlier_runs, *edit.sampling)
        model.given_frames = edit.given or model.given_frames
    edits |= {name: edits[name].frozen() for name in frozen}
    if trains:
        _check_something_trains(edits, frozen)
    else:
        _check_nothing_trains(edits)
    return _planned(model, edits)


def _apply(
    model: AttentionModel, name: str, method: Method, seed: int, earlier: Collection[str]
) -> Edit:
    """What one method does, its errors beginning with its name. earlier: the methods before it."""
    try:
        if method.inflates:
            model.host.require_rows("it")
        if method.reads_weights:
            _in_fp32(model)
        with _seeded(seed, name):
            return _with_start(method.apply(model), model)
    except TakenError as taken:
        if taken.owner in earlier:
            raise _both_claim(taken.owner, name, (taken.thing, taken.aspect)) from taken
        raise ValueError(
            f"methods.{name}: {taken}, by the run this backbone is the result of; choose "
            "other sites, or the backbone that run was trained on"
            + (", or its export with format=merged" if taken.merges else "")
        ) from taken
    except ValueError as error:
        raise ValueError(f"methods.{name}: {error}") from error
    except RuntimeError as error:
        error.add_note(f"methods.{name}")
        raise


def _in_fp32(model: AttentionModel) -> None:
    """Layers that were read in half precision, with the values that they have there."""
    import torch

    for _, value in model.named_parameters():
        if value.dtype in (torch.float16, torch.bfloat16):
            value.data = value.data.float()


def _check_claims(earlier: Mapping[str, Edit], name: str, edit: Edit) -> None:
    owners = {claim: other for other, each in earlier.items() for claim in each.claims}
    for claim in edit.claims:
        if claim in owners:
            raise _both_claim(owners[claim], name, claim)


def _check_something_trains(edits: Mapping[str, Edit], frozen: Collection[str]) -> None:
    if not any(edit.trains for edit in edits.values()):
        raise ValueError(
            f"nothing would train with methods {', '.join(edits)}; add one that trains weights"
            + (f", or give optim.lrs.{next(iter(frozen))} more than 0" if frozen else "")
        )


def _check_nothing_trains(edits: Mapping[str, Edit]) -> None:
    for name, edit in edits.items():
        if edit.trains:
            raise ValueError(
                f"methods.{name} has weights to train, which nothing has trained; fit a recipe "
                "with it, and give what that made as adapter="
            )


def _planned(model: AttentionModel, edits: Mapping[str, Edit]) -> Plan:
    """Makes what the edits train require a gradient, all else not, and counts both. What trains is
    fp32 whatever its layer is held in: small steps would be lost in half precision."""
    import torch

    from trainer.backbones.four_bits import numel

    trained = {parameter for edit in edits.values() for parameter in edit.trains}
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    kept = {name for edit in edits.values() for name in edit.keeps}
    for name in (trained | kept) & parameters.keys():  # small steps would be lost in half precision
        if parameters[name].dtype in (torch.float16, torch.bfloat16):
            parameters[name].data = parameters[name].data.float()
    chosen = [parameters[name].requires_grad_(True) for name in trained]
    return Plan(
        edits=edits,
        trained=sum(item.numel() for item in chosen),
        total=sum(map(numel, parameters.values())),
        trained_bytes=sum(item.numel() * item.element_size() for item in chosen),
        names=tuple(sorted(trained)),
        keeps=tuple(sorted(kept)),
    )


def _with_start(edit: Edit, model: AttentionModel) -> Edit:
    """The edit with a claim on the start of sampling, where one of its hooks has it.

    Raises:
        TakenError: a hook of another method has it.
    """
    from trainer.attention.hooks import START

    if not any(hook.begin or hook.source for hook in edit.sampling):
        return edit
    for owner, hooks in model.sampling_hooks.items():
        if any(hook.begin or hook.source for hook in hooks):
            raise TakenError(model.denoiser_name, START, owner)
    return replace(edit, claims=(*edit.claims, (model.denoiser_name, START)))


def _moved(before: Mapping[str, Parameter], model: AttentionModel) -> dict[str, str]:
    """Old name to new of the parameters whose name has changed because an adapter wrapped their
    layer in a layer of its own."""
    after = {id(parameter): name for name, parameter in model.named_parameters()}
    names = ((old, after.get(id(parameter), old)) for old, parameter in before.items())
    return {old: new for old, new in names if old != new}


def _both_claim(first: str, second: str, claim: tuple[str, str]) -> ValueError:
    thing, aspect = claim
    return ValueError(
        f"methods.{first} and methods.{second} both claim {aspect} of {thing}; remove one of them, "
        f"as in methods.{second}=null"
    )


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    import torch

    from trainer.common.seeds import seed_of

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "method", name))
        yield
