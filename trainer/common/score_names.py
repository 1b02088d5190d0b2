"""The names of scores, and which way of each is better."""

from __future__ import annotations

FIDELITY = "fidelity"
SECOND = "second judge: "
LOSS = "validation loss"
SHARES = (  # the scores shown as percentages, beside every `concept accuracy`
    "concept beside another", "the other beside it", "two concepts together", "known sprites",
    "direction right", "object right",
)  # fmt: skip
# how the names of scores begin of which more is better, and less
MORE = ("concept accuracy", *SHARES, FIDELITY, SECOND, "CLIP-I", "DINO", "CLIP-T", "DIV", "PSNR")
LESS = ("PRES", "prior drift", "KID", LOSS)


def better(line: str) -> int:
    """1 where more of a score is better, -1 where less is, and 0 where neither is, as of how steady
    frames are."""
    return 1 if line.startswith(MORE) else -1 if line.startswith(LESS) else 0


def is_share(line: str) -> bool:
    """Whether a score is shown as a percentage."""
    return line in SHARES or line.startswith(("concept accuracy", SECOND))
