"""What `sample` is told of a clip in blocks, or of one of which a part is known: `block=` and
`known=`, and what goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.diffusion.known_frames import KnownFrames
    from trainer.diffusion.sampling_settings import Sampling

NEITHER = "it is for clips in blocks, or of which a part is known; give block= or known= too"
TAKES = {
    "overlap": ("block", "blocks have frames in common; give block= too"),
    "take": ("known", "it says how many frames are read of a video; give known= too"),
    "every": ("known", "it says how far the frames of a video are apart; give known= too"),
    "shrink": ("known", "it says how much smaller a video is than the clip; give known= too"),
}


def refuse_idle_known(given: Mapping[str, Any]) -> None:
    """given: what a user has given, by name.

    Raises:
        ValueError: an option that has no effect; the message begins with it.
    """
    for name in ("reconstruction", "corrector"):
        if name in given and given.get("block") is None and given.get("known") is None:
            raise ValueError(f"{name}={given[name]} has no effect: {NEITHER}")
    for name, (partner, why) in TAKES.items():
        if name in given and given.get(partner) is None:
            raise ValueError(f"{name}={given[name]} has no effect: {why}")


def check_known(given: Mapping[str, Any]) -> None:
    """given: the options of `sample`, by name.

    Raises:
        ValueError: options that do not go together, or one that is missing.
    """
    beside = next((name for name in ("source", "image") if given[name] is not None), None)
    asked = next((name for name in ("block", "known") if given[name] is not None), None)
    if asked and beside:
        raise ValueError(f"{asked}= and {beside}= do not go together; leave one out")
    if given["block"] is not None and given["structure"] is not None:
        raise ValueError("block= and structure= do not go together; leave one out")
    if given["known"] is None:
        return
    if given["shrink"] == 1 and given["every"] == 1 and given["take"] is None:
        raise ValueError(
            "known= says nothing of what is to be made: give take=<frames> for a clip that goes on "
            "from them, every=4 for one with frames between them, or shrink=4 for a larger one"
        )
    if given["shrink"] > 1 and given["reconstruction"] == 0:
        raise ValueError(
            "reconstruction=0 replaces known frames, and those of shrink= are not in full size; "
            "give a weight above 0"
        )


@dataclass(frozen=True)
class KnownVideo:
    """A video that the frames of a clip are known of: every n-th frame of the clip, as many as
    `take`, None for all that fit; shrink: how many times smaller they are."""

    path: Path
    take: int | None = None
    every: int = 1
    shrink: int = 1

    def numbers(self, frames: int) -> tuple[int, ...]:
        """The frames of a clip that are known.

        Raises:
            ValueError: more than the clip has, or all of them.
        """
        most = (frames - 1) // self.every + 1
        count = most if self.take is None else self.take
        if count > most:
            raise ValueError(
                f"take={count}: a clip of frames={frames} has room for {most} frames with "
                f"every={self.every}; give more frames, or take fewer"
            )
        if count == frames and self.shrink == 1:
            raise ValueError(
                f"all {frames} frames of the clip are known; give more frames than {count}, or a "
                "larger every"
            )
        return tuple(range(0, count * self.every, self.every))


def known_of(backbone: Backbone, video: KnownVideo, settings: Sampling) -> KnownFrames:
    """What a video tells of a clip: its frames one after another, whatever their rate.

    Raises:
        ImageError: the video cannot be read, or is too short.
        ValueError: it does not fit the clip.
    """
    from trainer.cli.sample_source import square_side
    from trainer.diffusion.known_frames import KnownFrames
    from trainer.diffusion.source_clip import source_latents

    at = video.numbers(settings.frames)
    side = square_side(settings, "known")
    latents = source_latents(backbone, video.path, frames=len(at), fps=None, data={}, side=side)
    return KnownFrames.shrunk(latents[None], at, video.shrink)
