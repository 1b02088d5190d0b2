"""What a user is told of the chosen optimiser before a run: how its learning rate is meant, and
what else differs from AdamW."""

from __future__ import annotations

from trainer.config.optimisers import SCHEDULE_FREE, UNPAGED, missing_package
from trainer.config.schema import RecipeError
from trainer.config.sections import OptimSpec

SMALL = 0.1  # a factor below it is most likely a learning rate meant for AdamW


def check_optimiser(
    optim: OptimSpec, device: str = "auto", sharded: str | None = None
) -> list[str]:
    """Lines about the optimiser of a recipe. device: `run.device`; sharded: `run.strategy` where it
    shards the model.

    Raises:
        RecipeError: its package is not installed, and the message has the line that installs it; or
            the device has not what it needs; or it needs whole tensors and they are sharded.
    """
    _check_possible(optim, device, sharded)
    if optim.name == "prodigy":
        return [_of_prodigy(optim.lr)]
    if optim.name.startswith("lion"):
        return [
            f"optim.name={optim.name} moves every value by all of lr at each step: a third to a "
            "tenth of AdamW's learning rate is usual, with 3 to 10 times its weight decay; "
            f"optim.lr={optim.lr:g}, optim.weight_decay={optim.weight_decay:g}"
            + "".join(f", optim.lrs.{name}={lr:g}" for name, lr in optim.lrs.items())
        ]
    if optim.name == "adafactor":
        momentum = "no momentum, optim.betas=[0.9] keeps one" if optim.betas is None else "momentum"
        return [
            f"optim.name=adafactor: optim.lr={optim.lr:g} is used as it is, neither made relative "
            f"to the step nor to the weights; {momentum}"
        ]
    if optim.name == SCHEDULE_FREE:
        return [
            f"optim.name={SCHEDULE_FREE} averages weights in place of a schedule and of optim.ema: "
            "validation, previews and the adapter have the average; optim.warmup is its own warm-up"
        ]
    return []


def _check_possible(optim: OptimSpec, device: str, sharded: str | None) -> None:
    """Raises RecipeError as `check_optimiser`."""
    if sharded is not None and optim.name != "adamw":
        raise RecipeError(
            f"optim.name={optim.name} looks at whole tensors, and run.strategy={sharded} shards "
            "them; give optim.name=adamw, or run.strategy=ddp"
        )
    if missing := missing_package(optim.name):
        raise RecipeError(missing)
    if optim.name in UNPAGED and device in ("cpu", "mps"):
        raise RecipeError(
            f"optim.name={optim.name} pages between a CUDA GPU and main memory, and run.device is "
            f"{device}; set optim.name={UNPAGED[optim.name]}"
        )


def _of_prodigy(lr: float) -> str:
    if lr < SMALL:
        return (
            f"optim.lr={lr:g}: prodigy finds the learning rate and multiplies it by this; 1 is "
            "usual"
        )
    return (
        f"optim.name=prodigy finds the learning rate itself, logged as train/effective_lr; "
        f"optim.lr={lr:g} is a factor on it"
    )
