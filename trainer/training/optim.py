"""The optimisers of `optim.name`, and the learning rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from trainer.backbones.four_bits import bitsandbytes
from trainer.config.optimisers import OPTIMISERS, SCHEDULE_FREE, UNPAGED, missing_package
from trainer.training.distributed import by_kind
from trainer.training.optimizer_packages import PACKAGED

# optimisers of bitsandbytes (arXiv 2110.02861); in 8 bits, tensors below 4096 values have 32-bit
# moments
BITSANDBYTES = {
    "adamw8bit": "AdamW8bit",
    "paged_adamw8bit": "PagedAdamW8bit",
    "paged_adamw32bit": "PagedAdamW32bit",
    "lion8bit": "Lion8bit",
}
# what optimisers count in their groups; all else there is an option
COUNTED = ("k", "d", "d_max", "d_numerator", "d_denom", "d_hat", "weight_sum", "lr_max",
           "scheduled_lr")  # fmt: skip


@dataclass(frozen=True)
class Optim:
    """AdamW, one of `BITSANDBYTES`, Muon, or one of `PACKAGED`.

    The learning rate rises linearly over `warmup` of `steps`, then it is constant, or falls as a
    cosine to `final_lr` times lr; schedule-free AdamW warms up by itself. betas: None are the
    optimiser's own. muon_lr: the lr of the matrices that Muon trains; None is lr.
    """

    lr: float
    steps: int
    betas: tuple[float, ...] | None = None
    eps: float = 1e-8
    weight_decay: float = 1e-2
    warmup: int = 0
    schedule: str = "constant"
    final_lr: float = 0.0
    name: str = "adamw"
    muon_lr: float | None = None

    def factor(self, step: int) -> float:
        """The factor on lr at optimiser step `step`, counted from 0."""
        if self.name == SCHEDULE_FREE:
            return 1.0
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(
    optim: Optim,
    named: Mapping[str, nn.Parameter],
    *,
    lrs: Mapping[str, float],
    blocks: Sequence[str],
    device: str,
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser of `named` parameters.

    lrs: parameters with their own lr, by name; blocks: the prefixes of the names of parameters in
    blocks with attention. Muon trains the matrices there, except those with their own lr. scaled:
    whether the loss is scaled, as in fp16.

    Raises:
        ValueError: as `optimizer_class`; there is no matrix for Muon; the optimiser's package is
            not installed.
    """
    within = tuple(blocks) if optim.name == "muon" else ()
    matrices, by_lr = _for_muon(optim, named, lrs=lrs, within=within)
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        lr = optim.lr if optim.muon_lr is None else optim.muon_lr
        decay = optim.weight_decay
        parts.append(torch.optim.Muon(matrices, lr, decay, adjust_lr_fn="match_rms_adamw"))
    elif optim.name == "muon":
        raise ValueError(
            "optim.name=muon trains matrices in the blocks with attention, and no such matrix "
            "is trained; set optim.name=adamw"
        )
    if by_lr:
        groups = [
            {"params": part, "lr": lr}
            for lr, group in by_lr.items()
            for part in filter(None, by_kind(group))  # a fused step takes tensors of one kind
        ]
        parts.append(_made(optim, groups, device, fused=device == "cuda" and not scaled))
    return Muon(parts) if matrices else parts[0]


def _made(
    optim: Optim, groups: list[dict[str, Any]], device: str, *, fused: bool
) -> torch.optim.Optimizer:
    """The optimiser of groups of parameters, all but Muon's. fused: AdamW takes its whole step in
    one kernel for all tensors. On a CPU that gains next to nothing and rounds otherwise; and it
    would undo a scaled loss itself, after the gradients were clipped."""
    if (missing := missing_package(optim.name)) is not None:
        raise ValueError(missing)
    known = OPTIMISERS[optim.name]
    options: dict[str, Any] = {
        "lr": optim.lr,
        "betas": known.betas if optim.betas is None else optim.betas,
        "weight_decay": optim.weight_decay,
    }
    if known.eps:
        options["eps"] = optim.eps
    if optim.name in PACKAGED:
        return PACKAGED[optim.name](groups, warmup=optim.warmup, **options)
    kind = optimizer_class(optim.name, device)
    if kind is torch.optim.AdamW and fused:
        options["fused"] = True
    made: torch.optim.Optimizer = kind(groups, **options)
    return made


def effective_lr(optimizer: torch.optim.Optimizer) -> float | None:
    """The lr of the next step where the optimiser finds it, Prodigy's lr times d; None elsewhere.

    Its bias correction, near 1 after some hundred steps, is left out.
    """
    group = optimizer.param_groups[0]
    return group["lr"] * group["d"] if "d" in group else None


def lr_of_step(group: Mapping[str, Any]) -> float:
    """The lr of a group in the step that comes next; schedule-free AdamW warms up by itself."""
    warmup = group.get("warmup_steps") or 0
    share = min(1.0, (group["k"] + 1) / warmup) if warmup else 1.0
    return float(group["lr"]) * share


def order_of(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of an optimiser's parameters, in the order in which its state counts them."""
    names = {id(value): name for name, value in named.items()}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]


def restore_moments(
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Any],
    *,
    before: Sequence[str] | None,
    now: Sequence[str],
) -> None:
    """Gives an optimiser the moments of a stored state, and what it has counted in its groups. The
    groups, with lr, betas, eps and weight decay, stay its own, as the recipe has them.

    before, now: the order of parameters in the stored state and in this optimiser; before is None
    in a checkpoint of an earlier version.

    Raises:
        ValueError: an earlier version's state has other groups.
    """
    own = optimizer.state_dict()
    if before is None:
        sizes = [[len(group["params"]) for group in each["param_groups"]] for each in (stored, own)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "the checkpoint of an earlier version does not name its parameters, and this "
                "recipe groups them otherwise; keep optim.lrs as it was, or choose another run.id"
            )
    places = {name: number for number, name in enumerate(now if before is None else before)}
    numbers = [places[name] for name in now]  # in the stored state, by the number here
    state = {
        number: stored["state"][earlier]
        for number, earlier in enumerate(numbers)
        if earlier in stored["state"]
    }
    of = {number: group for group in stored["param_groups"] for number in group["params"]}
    earlier_groups = [of[numbers[group["params"][0]]] for group in own["param_groups"]]
    groups = [
        {**group, **{key: had[key] for key in COUNTED if key in had}}
        for group, had in zip(own["param_groups"], earlier_groups, strict=True)
    ]
    optimizer.load_state_dict({**own, "state": state, "param_groups": groups})
    if "train_mode" in own["param_groups"][0]:
        _take_betas(optimizer, [group["betas"] for group in earlier_groups])


def _take_betas(optimizer: Any, before: Sequence[Sequence[float]]) -> None:
    """Schedule-free weights y = (1 - beta) z + beta x of an earlier beta, for the beta of the
    recipe: x stays as it was."""
    own = [group["betas"] for group in optimizer.param_groups]
    if list(map(tuple, before)) == list(map(tuple, own)):
        return
    for betas, change in ((before, optimizer.eval), (own, optimizer.train)):
        for group, each in zip(optimizer.param_groups, betas, strict=True):
            group["betas"] = each
        change()


def restore_schedule(
    schedule: torch.optim.lr_scheduler.LambdaLR, stored: Mapping[str, Any]
) -> None:
    """Takes a schedule to the step of a stored one, and the optimiser to the lr that this schedule
    has there: the recipe's lr, warm-up and decay hold, not the stored ones."""
    place = {name: stored[name] for name in ("last_epoch", "_step_count")}
    schedule.load_state_dict({**schedule.state_dict(), **place})
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]


def _for_muon(
    optim: Optim,
    named: Mapping[str, nn.Parameter],
    *,
    lrs: Mapping[str, float],
    within: tuple[str, ...],
) -> tuple[list[nn.Parameter], dict[float, list[nn.Parameter]]]:
    """The matrices that Muon trains, and all other parameters by their lr."""
    matrices, by_lr = [], defaultdict(list)
    for name, value in named.items():
        if value.ndim == 2 and name.startswith(within) and name not in lrs:
            matrices.append(value)
        else:
            by_lr[lrs.get(name, optim.lr)].append(value)
    return matrices, by_lr


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) and the optimiser of all
    other parameters, as one optimiser with one list of groups and one state, for schedules,
    checkpoints and callbacks.

    Muon's step is the orthogonalised momentum, times 0.2 sqrt(max(rows, columns)) lr, so that its
    values are as large as AdamW's (arXiv 2502.16982, section 2.2).
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        groups = iter(self.param_groups)
        for part in self.parts:  # `load_state_dict` has replaced the groups and the state
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            part.step()
        return loss


def optimizer_class(name: str, device: str) -> Any:
    """The optimiser class for parameters that Muon does not train.

    Raises:
        ValueError: bitsandbytes is not installed, or a paged optimiser is requested on a CPU.
    """
    if name not in BITSANDBYTES:
        return torch.optim.AdamW
    if name in UNPAGED and device != "cuda":
        raise ValueError(
            f"optim.name={name} pages between a GPU and main memory, and this run is on {device}; "
            f"set optim.name={UNPAGED[name]}"
        )
    return getattr(bitsandbytes(f"optim.name={name}").optim, BITSANDBYTES[name])
