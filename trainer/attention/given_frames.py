"""What a clip lacks that is given to a model, which makes the complete one."""

from __future__ import annotations

from dataclasses import dataclass

# the inputs by which a caller fixes what training draws, see `input_channels.py`
KNOWN = "known"  # (b, f): which frames are given
LEVEL = "level"  # (b,): the noise that is laid over them


@dataclass(frozen=True)
class GivenFrames:
    """Where the frames of a given clip are in the complete one: the first follows `before` others,
    `between` others lie between two of them, and no fewer than `after` follow the last.

    kept: whether the complete clip keeps them as they are; otherwise the model makes them again,
    too. fixed: whether the model was made for this `between` alone, with no others before or after,
    and makes no clip without a given one. level: of the noise that is laid over the given clip, in
    [0, 1), None for a model that knows none.
    """

    before: int = 0
    between: int = 0
    after: int = 0
    kept: bool = False
    fixed: bool = False
    level: float | None = None

    def places(self, frames: int) -> range:
        """Of the given frames among `frames`, counted from 0.

        Raises:
            ValueError: there is no place for one.
        """
        found = range(self.before, frames - self.after, self.between + 1)
        if not found:
            raise ValueError(
                f"before={self.before} and after={self.after} leave none of {frames} frames to be "
                "given; lower one of them, or give more frames"
            )
        return found
