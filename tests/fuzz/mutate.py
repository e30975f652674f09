"""Damages the bytes of a file in the ways that find the most: flips, swaps, cuts, repeats, numbers at the limits."""

from __future__ import annotations

import numpy as np

_NUMBERS = (
    b"\x00",
    b"\x7f",
    b"\x80\x01",
    b"\xff\xff\xff\xff\x0f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xff" * 9 + b"\x01",
)


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """One to eight damages. Most hit the first or last kilobytes, where graphs stand and weights do not."""
    found = bytearray(data)
    for _ in range(int(random.integers(1, 9))):
        if not found:
            break
        span = min(len(found), int(random.choice([64, 2048, len(found)])))
        place = int(random.integers(span))
        if random.random() < 0.5:
            place = len(found) - 1 - place
        kind = random.integers(7)
        length = int(random.integers(1, 17))
        if kind == 0:
            found[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            found[place] = int(random.integers(256))
        elif kind == 2:
            del found[place : place + length]
        elif kind == 3:
            found[place:place] = found[place : place + length]
        elif kind == 4:
            number = _NUMBERS[int(random.integers(len(_NUMBERS)))]
            found[place : place + len(number)] = number
        elif kind == 5:
            other = int(random.integers(len(found)))
            found[place : place + length] = found[other : other + length]
        elif random.random() < 0.3:
            del found[place:]
    return bytes(found)
