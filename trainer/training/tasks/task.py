"""What every task has: the module calls these and knows no more of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.attention.step_result import StepResult
    from trainer.data.loader import Batch
    from trainer.diffusion.sampling_settings import Sampling

# which random numbers a batch meets; `prepare` is for methods that look at the data beforehand
Purpose = Literal["train", "validate", "prepare"]


class Task(Protocol):
    """Encodes a batch, takes its loss, samples what was learned, and scores it on held-out data."""

    def encode(self, batch: Batch, purpose: Purpose = "train") -> Any:
        """All that a loss needs of a batch, as a record of the task's own; the random numbers are
        those of the batch's step and positions."""
        ...

    def loss(self, state: Any) -> StepResult:
        """One forward on what `encode` returned."""
        ...

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: Sampling) -> Tensor:
        """Pictures (b, 3, H, W) in [-1, 1], or the frames of clips (b f, 3, H, W)."""
        ...

    def score(self, batch: Batch, levels: Sequence[float]) -> Tensor:
        """Of each sample of a validation batch at each level in [0, 1), (levels, b), the same in
        every call; less is better."""
        ...
