"""Seeds by purpose: every random number of a run depends on what it is for, never on the random
numbers before it."""

from __future__ import annotations

import hashlib


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from what it is for, as in `seed_of(run_seed, "noise", step, row)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
