"""What is known of each optimiser of `optim.name` without importing it, and which options it has.

Options belong to the optimiser they were written for: a learning rate of 1e-4 is none for Prodigy,
whose own is a factor near 1. Where a file or the command line names another optimiser, options of
the recipe below that the new one does not have, or reads otherwise, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

SCHEDULE_FREE = "schedule_free_adamw"
RATES = frozenset({"lr", "lrs", "muon_lr", "scale_lr"})


@dataclass(frozen=True)
class Optimiser:
    """betas: its own, which `optim.betas` replaces by as many; empty where it keeps no momentum by
    itself, and one number gives it one. moments: values that it keeps for each trained value. eps:
    whether it has `optim.eps`. lr: `optim.lr` where none is given. package: what is imported, and
    extra: what installs it; both are empty for what every installation has."""

    betas: tuple[float, ...]
    moments: float
    eps: bool = True
    lr: float = 1e-4
    package: str = ""
    extra: str = ""

    @property
    def numbers(self) -> int:
        """How many numbers `optim.betas` has."""
        return len(self.betas) or 1


ADAM, LION = (0.9, 0.999), (0.9, 0.99)
OPTIMISERS: dict[str, Optimiser] = {
    "adamw": Optimiser(ADAM, 2),
    "adamw8bit": Optimiser(ADAM, 0.5, package="bitsandbytes", extra="qlora"),
    "paged_adamw8bit": Optimiser(ADAM, 0.5, package="bitsandbytes", extra="qlora"),
    "paged_adamw32bit": Optimiser(ADAM, 2, package="bitsandbytes", extra="qlora"),
    "muon": Optimiser(ADAM, 2),
    "prodigy": Optimiser(ADAM, 4, lr=1.0, package="prodigyopt", extra="prodigy"),
    "adafactor": Optimiser((), 0, eps=False),
    "lion": Optimiser(LION, 1, eps=False, package="lion_pytorch", extra="lion"),
    "lion8bit": Optimiser(LION, 0.25, eps=False, package="bitsandbytes", extra="qlora"),
    SCHEDULE_FREE: Optimiser(ADAM, 2, package="schedulefree", extra="schedule-free"),
    "came": Optimiser((*ADAM, 0.9999), 1, eps=False, package="came_pytorch", extra="came"),
}
# paged between a CUDA GPU and main memory, each with what it is without pages
UNPAGED = {"paged_adamw8bit": "adamw8bit", "paged_adamw32bit": "adamw"}
# what other trainers and the packages themselves call them, in small letters
CALLED = {
    "adam8bit": "adamw8bit", "adamw_8bit": "adamw8bit", "8bit-adamw": "adamw8bit",
    "bnb_adamw8bit": "adamw8bit", "pagedadamw8bit": "paged_adamw8bit",
    "paged_adamw_8bit": "paged_adamw8bit", "paged_adamw_32bit": "paged_adamw32bit",
    "pagedadamw": "paged_adamw32bit", "paged_adamw": "paged_adamw32bit",
    "pagedadamw32bit": "paged_adamw32bit",
    "prodigyopt": "prodigy", "prodigy_adamw": "prodigy", "lion_8bit": "lion8bit",
    "lion-pytorch": "lion", "lion_pytorch": "lion", "adafactor_torch": "adafactor",
    "adamwschedulefree": SCHEDULE_FREE, "adamw_schedule_free": SCHEDULE_FREE,
    "adamw_schedulefree": SCHEDULE_FREE, "schedulefree": SCHEDULE_FREE,
    "schedule_free": SCHEDULE_FREE, "came_pytorch": "came", "came-pytorch": "came",
}  # fmt: skip


def own_betas(name: object) -> list[float] | None:
    """What `optim.betas` is where it is null, with `optim.name` as in a recipe's tree or None."""
    known = OPTIMISERS.get(str(name or "adamw"))
    return list(known.betas) or None if known else None


def missing_package(name: str) -> str | None:
    """What to say where the package of an optimiser is not installed; None where it is."""
    known = OPTIMISERS[name]
    if not known.package or find_spec(known.package) is not None:
        return None
    return (
        f"optim.name={name} needs {known.package}; pip install 'attention-trainer[{known.extra}]'"
    )


def unsuited(name: str, values: Mapping[str, Any]) -> str | None:
    """Why the optimiser `name` cannot have the values of the section `optim`, a sentence that
    begins with the key; None if it can."""
    betas, needed = values["betas"], OPTIMISERS[name].numbers
    if betas is not None and len(betas) != needed:
        own = list(OPTIMISERS[name].betas) or [0.9]
        what = "1 number" if needed == 1 else f"{needed} numbers"
        return f"betas={list(betas)}: {name} takes {what}, as in {own}; null takes its own"
    if name == "prodigy":
        return _unlike_rates(values)
    if name != SCHEDULE_FREE:
        return None
    if values["schedule"] != "constant":
        return (
            f"schedule={values['schedule']}: {name} averages weights in place of lowering the "
            "learning rate; give optim.schedule=constant"
        )
    if values["ema"] is not None:
        return f"ema={values['ema']:g}: {name} averages the weights itself; give optim.ema=null"
    if betas is not None and not betas[0]:
        return f"betas={list(betas)}: the first weighs {name}'s average, and must be above 0"
    return None


def _unlike_rates(values: Mapping[str, Any]) -> str | None:
    lr = values["lr"]
    if values["scale_lr"]:
        return "scale_lr=true: prodigy finds the learning rate itself; give optim.scale_lr=false"
    unlike = [method for method, rate in values["lrs"].items() if rate not in (0, lr)]
    if not unlike:
        return None
    return (
        f"lrs={{{unlike[0]}: {values['lrs'][unlike[0]]:g}}}: prodigy finds one learning rate for "
        f"all that trains; leave it out, or give optim.lrs.{unlike[0]}={lr:g} as optim.lr is"
    )


def for_another(low: Mapping[str, Any], high: Mapping[str, Any]) -> Mapping[str, Any]:
    """`low`, a recipe's tree that `high` is laid over, without the options that are not for the
    optimiser that `high` names."""
    new, old = _name(high), _name(low) or "adamw"
    if new is None or not (dropped := _dropped(old, new)):
        return low
    kept = _without(low, dropped)
    for table in ("families", "backbones"):
        if isinstance(each := low.get(table), Mapping):
            kept[table] = {
                name: _without(own, dropped) if isinstance(own, Mapping) else own
                for name, own in each.items()
            }
    return kept


def _dropped(old: str, new: str) -> frozenset[str]:
    """The options written for the optimiser `old` that `new` does not have, or reads otherwise."""
    before, now = OPTIMISERS[old], OPTIMISERS[new]
    found = RATES if now.lr != before.lr else frozenset()
    if new not in (old, "muon"):
        found |= {"muon_lr"}
    if new != old and new == SCHEDULE_FREE:
        found |= {"schedule", "final_lr", "ema"}
    found |= {"betas"} if now.numbers != before.numbers else set()
    return found | (set() if now.eps else {"eps"})


def with_own_lr(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree, with `optim.lr` written out where the optimiser has one of its own and none
    is given."""
    name = _name(tree)
    if name is None or OPTIMISERS[name].lr == Optimiser.lr or tree["optim"].get("lr") is not None:
        return tree
    return {**tree, "optim": {**tree["optim"], "lr": OPTIMISERS[name].lr}}


def _name(tree: Mapping[str, Any]) -> str | None:
    """The optimiser that a tree names; None without one, or with one that there is not."""
    section = tree.get("optim")
    name = section.get("name") if isinstance(section, Mapping) else None
    return name if isinstance(name, str) and name in OPTIMISERS else None


def _without(tree: Mapping[str, Any], dropped: frozenset[str]) -> dict[str, Any]:
    section = tree.get("optim")
    if not isinstance(section, Mapping):
        return dict(tree)
    own = {key: value for key, value in section.items() if key not in dropped}
    if "lrs" in dropped and isinstance(rates := section.get("lrs"), Mapping):
        own["lrs"] = {method: rate for method, rate in rates.items() if rate == 0}  # not trained
    return {**tree, "optim": own}
