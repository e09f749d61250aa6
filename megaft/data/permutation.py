"""Constant-memory shuffling: a keyed pseudo-random permutation, computed position by position."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

ROUNDS = 6


def permute(index: int, length: int, *key: object) -> int:
    """Return the image of `index` in the pseudo-random permutation of range(length) selected by `key`.

    A Feistel network over the next even power of two, walked until it lands inside the range (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"). It depends only on its arguments: no library's generator, no state.
    """
    assert 0 <= index < length, (index, length)
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    round_keys = _round_keys(key)
    while True:
        left, right = index >> half_bits, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        index = (left << half_bits) | right
        if index < length:
            return index


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[object, ...]) -> tuple[int, ...]:
    digest = blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, 8 * ROUNDS, 8))


def _mix(value: int, round_key: int) -> int:
    """Scramble 64 bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = (value + round_key) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
