"""Features of one run of a denoiser that another run reads: queries, keys, values, maps, or what a
residual block makes, by the step and the place they were found at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

MEGABYTE = 1 << 20


class FeatureBank:
    """Tensors by (step, place), a name each; the place is that of a site or a block.

    most_tokens: places of more tokens are not kept, None for all; limit: megabytes of all that is
    kept; offload: whether tensors wait on the CPU, and come back to the device of `like`.
    """

    def __init__(
        self,
        *,
        most_tokens: int | None = None,
        limit: float | None = None,
        offload: bool = False,
    ) -> None:
        self.most_tokens, self.limit, self.offload = most_tokens, limit, offload
        self.kept: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.bytes = 0

    def takes(self, tokens: int) -> bool:
        """Whether features of so many tokens are kept."""
        return self.most_tokens is None or tokens <= self.most_tokens

    def put(self, step: int, place: str, features: Mapping[str, Tensor]) -> None:
        """Keeps features, in place of those that were there.

        Raises:
            ValueError: they would take more memory than the limit.
        """
        before = self.kept.pop((step, place), {})
        after = self.bytes - _bytes(before) + _bytes(features)
        if self.limit is not None and after > self.limit * MEGABYTE:
            raise ValueError(
                f"the features of {len(self.kept) + 1} layers and steps take "
                f"{after / MEGABYTE:.1f} MB, and the limit is {self.limit:g}; give a higher limit, "
                "fewer tokens, a shorter window of steps, or fewer sites"
            )
        self.bytes = after
        own = {name: value.detach() for name, value in features.items()}
        # a copy: a view would keep all rows of the batch it was cut from
        self.kept[step, place] = {
            name: value.to("cpu", copy=True) if self.offload else value.clone()
            for name, value in own.items()
        }

    def get(self, step: int, place: str, like: Tensor) -> dict[str, Tensor]:
        """The features of a step and place, on the device and in the type of `like`.

        Raises:
            ValueError: none were kept there.
        """
        found = self.kept.get((step, place))
        if found is None:
            raise ValueError(
                f"nothing was kept of {place!r} at step {step}; sample in as many steps as were "
                "inverted, with the same sites"
            )
        return {name: value.to(like) for name, value in found.items()}

    def clear(self) -> None:
        self.kept.clear()
        self.bytes = 0

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self.kept

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self.kept)


def _bytes(features: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * torch.finfo(value.dtype).bits // 8 for value in features.values())
