"""Windows of a sampler's steps, as shares of their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.attention.context import StepContext

Window = tuple[float, float]  # the share at which it begins, and that at which it has ended


def is_inside(window: Window | None, ctx: StepContext) -> bool:
    """Whether a step is in a window; None is a window without a step."""
    return window is not None and window[0] <= ctx.step / ctx.num_steps < window[1]


def refuse_empty(windows: Mapping[str, Window | None], steps: int) -> None:
    """windows: by the names of the options that give them.

    Raises:
        ValueError: a window other than None has none of the steps.
    """
    for name, window in windows.items():
        if window is not None and not any(window[0] <= i / steps < window[1] for i in range(steps)):
            raise ValueError(
                f"{name}=[{window[0]:g},{window[1]:g}] has none of {steps} steps; give a longer "
                "window, or null for no step"
            )
