"""A permutation of very many places that is not stored: where each place goes is calculated.

A Feistel network of six rounds is a bijection of the numbers of an even count of bits; a number
beyond the last place is put through it again until it falls on a place, which keeps it a bijection
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4).
"""

from __future__ import annotations

from trainer.common.seeds import seed_of

ROUNDS = 6
WORD = 2**64 - 1


def far_place(place: int, size: int, key: int) -> int:
    """Where `place` of `size` places goes; another key gives another permutation."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [(key * ROUNDS + number) & WORD for number in range(ROUNDS)]
    found = place
    while True:
        found = _network(found, half, keys)
        if found < size:
            return found


def far_key(seed: int, group: int, epoch: int) -> int:
    """The key of one epoch of a group."""
    return seed_of(seed, "far shuffle", group, epoch)


def _network(value: int, half: int, keys: list[int]) -> int:
    """One pass of a number of 2 * half bits."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return left << half | right


def _mixed(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WORD
    return value ^ value >> 31
