"""What is known of a clip before it is sampled: some of its frames, or what they look like at a
lower resolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import avg_pool2d


@dataclass(frozen=True, eq=False)
class KnownFrames:
    """Clean latents (n, k, c, h, w) of the k frames of each of n clips whose numbers are `at`; n
    may be 1 for what all clips have in common. shrink: where above 1, latents (n, k, c, h / shrink,
    w / shrink) that are means over shrink x shrink of the clip's own.

    Raises:
        ValueError: other numbers of frames, or a number twice.
    """

    latents: Tensor
    at: tuple[int, ...]
    shrink: int = 1

    def __post_init__(self) -> None:
        if self.latents.shape[1] != len(self.at) or len(set(self.at)) != len(self.at):
            raise ValueError(
                f"{self.latents.shape[1]} known frames with the numbers {list(self.at)}; give each "
                "frame a number of its own"
            )

    @classmethod
    def shrunk(cls, latents: Tensor, at: tuple[int, ...], shrink: int) -> KnownFrames:
        """The same of latents in full size (n, k, c, h, w).

        Raises:
            ValueError: `shrink` does not divide their sides.
        """
        height, width = latents.shape[-2:]
        if height % shrink or width % shrink:
            raise ValueError(
                f"shrink={shrink} does not divide latents of {width}x{height}; give a number that "
                "divides both sides"
            )
        return cls(square_means(latents, shrink), at, shrink)

    def seen_in(self, clips: Tensor) -> Tensor:
        """What of clips (n, f, c, h, w) is to be as `latents` are."""
        return square_means(clips[:, list(self.at)], self.shrink)

    def within(self, span: range) -> KnownFrames | None:
        """What is known of a block of frames, by their numbers in it; None for nothing."""
        inside = [place for place, number in enumerate(self.at) if number in span]
        if not inside:
            return None
        at = tuple(self.at[place] - span.start for place in inside)
        return replace(self, latents=self.latents[:, inside], at=at)

    def to(self, other: Tensor) -> KnownFrames:
        """In the precision and on the device of another tensor."""
        return replace(self, latents=self.latents.to(other))


def square_means(clips: Tensor, shrink: int) -> Tensor:
    """Means over shrink x shrink of the last two axes of (n, f, c, h, w)."""
    if shrink == 1:
        return clips
    return avg_pool2d(clips.flatten(0, 1), shrink).unflatten(0, clips.shape[:2])


def without(known: KnownFrames, numbers: range) -> KnownFrames | None:
    """Without the frames of these numbers; None for nothing left."""
    kept = [place for place, number in enumerate(known.at) if number not in numbers]
    if not kept:
        return None
    at = tuple(known.at[place] for place in kept)
    return replace(known, latents=known.latents[:, kept], at=at)
