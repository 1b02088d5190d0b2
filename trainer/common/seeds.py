"""Seeds by purpose: every random draw of a run is a function of what it is for, never of what was
drawn before."""

from __future__ import annotations

import hashlib


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from what it is for, as in `seed_of(run_seed, "noise", step, place)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
