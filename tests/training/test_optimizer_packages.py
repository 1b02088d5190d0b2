"""Each optimiser, wired by us, steps as its package does alone in a plain loop; it goes on from a
stored state with the same bits; and what is particular to each."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.optimisers import OPTIMISERS
from trainer.training.optim import (
    COUNTED,
    Optim,
    effective_lr,
    lr_of_step,
    make_optimizer,
    order_of,
    restore_moments,
    restore_schedule,
)

STEPS, HALF, WARMUP, FINAL = 90, 60, 2, 0.1  # at HALF Prodigy has begun to raise its lr
LRS = {"prodigy": 1.0}
SHAPES = {
    "net.blocks.0.lora_A.weight": (2, 6), "net.blocks.0.lora_B.weight": (5, 2),
    "net.blocks.0.conv.weight": (3, 2, 3, 3), "net.bias": (5,), "net.head.weight": (65, 64),
}  # fmt: skip
Named = dict[str, nn.Parameter]


def parameters() -> Named:
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    nn.init.zeros_(named["net.blocks.0.lora_B.weight"])  # as a LoRA begins
    return named


def gradients(named: Named, step: int) -> None:
    """Those of a small problem: 0 at one place in the first step, as of lora_A."""
    generator = torch.Generator().manual_seed(step)
    loss = torch.zeros(())
    for name, value in sorted(named.items()):
        target = 3 + 0.1 * torch.randn(value.shape, generator=generator)
        weight = 0.0 if step == 0 and "lora_A" in name else 1.0
        loss = loss + weight * (value - target).pow(4).mean()
    for value in named.values():
        value.grad = None
    loss.backward()  # type: ignore[no-untyped-call]


def optim_of(name: str, **changes: Any) -> Optim:
    schedule = "constant" if name == "schedule_free_adamw" else "cosine"
    values: dict[str, Any] = {
        "name": name, "weight_decay": 0.03, "warmup": WARMUP, "schedule": schedule,
        "final_lr": FINAL, **changes,
    }  # fmt: skip
    lr = values.pop("lr", LRS.get(name, 3e-3))
    return Optim(lr, STEPS, **values)


class Wired:
    """An optimiser as a run has it, with its schedule."""

    def __init__(self, name: str, named: Named, **changes: Any) -> None:
        self.named, self.optim = named, optim_of(name, **changes)
        self.optimizer = make_optimizer(
            self.optim, named, lrs={}, blocks=("net.blocks.",), device="cpu"
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.optim.factor)

    def step(self, step: int) -> None:
        gradients(self.named, step)
        self.optimizer.step()
        self.schedule.step()


def alone(name: str, values: list[nn.Parameter]) -> Any:
    """The optimiser as somebody would make it who has read its package's own page."""
    decay = {"weight_decay": 0.03}
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(values, use_bias_correction=True, safeguard_warmup=True, **decay)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(values, lr=3e-3, relative_step=False, scale_parameter=False, **decay)
    if name == "lion":
        from lion_pytorch import Lion

        return Lion(values, lr=3e-3, **decay)
    if name == "came":
        from came_pytorch.CAME import CAME

        return CAME(values, lr=3e-3, **decay)
    if name == "schedule_free_adamw":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(values, lr=3e-3, warmup_steps=WARMUP, **decay)
    import bitsandbytes as bnb

    return {"lion8bit": bnb.optim.Lion8bit, "adamw8bit": bnb.optim.AdamW8bit}[name](
        values, lr=3e-3, **decay
    )


def factor(step: int) -> float:
    """A warm-up of 2 steps, then a cosine to a tenth at the end of 90."""
    if step < WARMUP:
        return (step + 1) / 3
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * (step - WARMUP) / 88)) / 2


TRIED = ("prodigy", "adafactor", "lion", "lion8bit", "came", "schedule_free_adamw", "adamw8bit")


@pytest.mark.parametrize("name", TRIED)
def test_it_steps_as_its_package_alone(name: str) -> None:
    wired, plain = Wired(name, parameters()), parameters()
    optimizer = alone(name, list(plain.values()))
    lr = optimizer.param_groups[0]["lr"]
    if name == "schedule_free_adamw":
        optimizer.train()
    for step in range(STEPS):
        if name != "schedule_free_adamw":
            optimizer.param_groups[0]["lr"] = lr * factor(step)
        gradients(plain, step)
        optimizer.step()
        wired.step(step)
        for key, value in plain.items():
            assert torch.equal(value, wired.named[key]), (step, key)
    start = parameters()
    assert all(not torch.equal(value, start[key]) for key, value in plain.items())


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if not name.startswith("paged")])
def test_it_goes_on_from_a_stored_state_bit_for_bit(name: str) -> None:
    """The parameters are stored by name: here they come in another order."""
    whole = Wired(name, parameters())
    for step in range(HALF):
        whole.step(step)
    file = io.BytesIO()
    torch.save(
        {
            "optimizer": whole.optimizer.state_dict(),
            "schedule": whole.schedule.state_dict(),
            "order": order_of(whole.optimizer, whole.named),
        },
        file,
    )
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    turned = dict(reversed([(key, nn.Parameter(v.detach().clone())) for key, v in
                            whole.named.items()]))  # fmt: skip
    again = Wired(name, turned)
    restore_moments(
        again.optimizer,
        stored["optimizer"],
        before=stored["order"],
        now=order_of(again.optimizer, turned),
    )
    restore_schedule(again.schedule, stored["schedule"])
    for step in range(HALF, STEPS):
        whole.step(step)
        again.step(step)
    if name == "prodigy":  # its sums over all parameters are made in another order
        assert all(torch.allclose(v, turned[k], atol=1e-6) for k, v in whole.named.items())
        assert effective_lr(again.optimizer) == pytest.approx(effective_lr(whole.optimizer))
        assert stored["optimizer"]["param_groups"][0]["d"] > 1e-6  # it would begin with
    else:
        assert all(torch.equal(value, turned[key]) for key, value in whole.named.items())


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if not name.startswith("paged")])
def test_all_that_it_counts_in_its_groups_is_known(name: str) -> None:
    """What changes there as it steps is what a checkpoint must give back."""
    wired = Wired(name, parameters())
    before = [dict(group) for group in wired.optimizer.param_groups]
    for step in range(HALF):
        wired.step(step)
    changed = {
        key
        for old, new in zip(before, wired.optimizer.param_groups, strict=True)
        for key in new
        if key not in ("params", "lr") and (key not in old or old[key] != new[key])
    }
    assert changed <= set(COUNTED)
    if name == "prodigy":
        assert changed == {"k", "d", "d_max", "d_numerator", "d_denom", "d_hat"}
    if name == "schedule_free_adamw":
        assert changed == {"k", "weight_sum", "lr_max", "scheduled_lr"}


def test_prodigy_prints_nothing_and_tells_its_lr(capsys: pytest.CaptureFixture[str]) -> None:
    wired = Wired("prodigy", parameters(), schedule="constant", warmup=0)
    assert capsys.readouterr().out == ""
    assert effective_lr(wired.optimizer) == 1e-6  # d0
    for step in range(HALF):
        wired.step(step)
    group = wired.optimizer.param_groups[0]
    assert effective_lr(wired.optimizer) == group["d"] > 2e-6
    wired.optimizer.param_groups[0]["lr"] = 0.5
    assert effective_lr(wired.optimizer) == 0.5 * group["d"]
    assert effective_lr(Wired("adafactor", parameters()).optimizer) is None


def test_adafactor_has_a_momentum_where_one_is_given() -> None:
    without, with_one = Wired("adafactor", parameters()), Wired(
        "adafactor", parameters(), betas=(0.7,)
    )  # fmt: skip
    for wired in (without, with_one):
        wired.step(0)
    assert not any("exp_avg" in state for state in without.optimizer.state.values())
    assert all("exp_avg" in state for state in with_one.optimizer.state.values())
    assert {group["beta1"] for group in with_one.optimizer.param_groups} == {0.7}


@pytest.mark.parametrize("name", TRIED)
def test_betas_eps_and_groups_reach_it(name: str) -> None:
    known = OPTIMISERS[name]
    betas = tuple(0.5 + 0.1 * i for i in range(known.numbers))
    optim = optim_of(name, betas=betas, eps=1e-3)
    lrs = {} if name == "prodigy" else {"net.bias": 0.25}
    optimizer = make_optimizer(optim, parameters(), lrs=lrs, blocks=(), device="cpu")
    for group in optimizer.param_groups:
        given = (group["beta1"],) if name == "adafactor" else tuple(group["betas"])
        assert given == betas
        assert group["weight_decay"] == 0.03
        if known.eps:
            assert group["eps"] == 1e-3
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {LRS.get(name, 3e-3), *lrs.values()}


def test_another_beta_keeps_the_average_of_schedule_free_weights() -> None:
    """x is what was learned; with another beta the weights that train, y, lie elsewhere."""

    def averages(wired: Wired) -> dict[str, Tensor]:
        optimizer: Any = wired.optimizer
        optimizer.eval()
        found = {name: value.detach().clone() for name, value in wired.named.items()}
        optimizer.train()
        return found

    first = Wired("schedule_free_adamw", parameters())
    for step in range(4):
        first.step(step)
    state = first.optimizer.state_dict()
    copies = {name: nn.Parameter(value.detach().clone()) for name, value in first.named.items()}
    other = Wired("schedule_free_adamw", copies, betas=(0.5, 0.999))
    names = list(copies)
    restore_moments(other.optimizer, state, before=names, now=names)
    assert {group["betas"] for group in other.optimizer.param_groups} == {(0.5, 0.999)}
    assert not torch.allclose(copies["net.bias"], first.named["net.bias"], atol=1e-4)
    ours, theirs = averages(other), averages(first)
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())


def test_the_schedule_of_schedule_free_is_its_own() -> None:
    optim = optim_of("schedule_free_adamw", warmup=3)
    assert [optim.factor(step) for step in range(5)] == [1.0] * 5
    optimizer = make_optimizer(optim, parameters(), lrs={}, blocks=(), device="cpu")
    assert {group["warmup_steps"] for group in optimizer.param_groups} == {3}


def test_a_step_without_gradients_is_no_step() -> None:
    """A skipped step changes nothing of those that follow, in the average neither."""

    def after(skipped: int) -> Wired:
        wired = Wired("schedule_free_adamw", parameters(), lr=1e-2)
        for _ in range(skipped):
            wired.optimizer.step()
        for step in range(3):
            wired.step(step)
        return wired

    plain, skipping = after(0), after(3)
    groups = [each.optimizer.param_groups[0] for each in (plain, skipping)]
    assert groups[0]["k"] == groups[1]["k"] == 3
    assert groups[0]["weight_sum"] == groups[1]["weight_sum"] > 0
    for name, value in plain.named.items():
        assert torch.equal(value, skipping.named[name]), name


def test_the_lr_of_a_step_is_that_of_its_own_warm_up() -> None:
    wired = Wired("schedule_free_adamw", parameters(), warmup=4)
    (group,) = wired.optimizer.param_groups
    told, used = [], []
    for step in range(6):
        told.append(lr_of_step(group))
        wired.step(step)
        used.append(group["scheduled_lr"])
    assert told == pytest.approx(used)
    assert told[0] == pytest.approx(3e-3 / 4) and told[5] == 3e-3
    (plain,) = Wired("came", parameters()).optimizer.param_groups
    assert lr_of_step(plain) == plain["lr"]


LOSS: Callable[[], float] = lambda: 2.5  # noqa: E731


@pytest.mark.parametrize("name", TRIED)
def test_the_loss_of_the_closure_comes_back(name: str) -> None:
    wired = Wired(name, parameters())
    gradients(wired.named, 0)
    assert wired.optimizer.step(LOSS) == 2.5
