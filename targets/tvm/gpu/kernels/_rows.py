"""How the threads of a block share rows among them."""

from __future__ import annotations

from onnxcomp.targets.tvm.gpu.machine import WARP

_BLOCK = 256
BY_WARPS = 1024
"""Length up to which a warp takes a row."""

_HELD = 32
"""Values of a row that a thread holds in registers at most."""


def team(n: int) -> tuple[int, int]:
    """Threads that take a row of `n` values together, a warp or a block, and how many such teams a block has."""
    if n <= BY_WARPS:
        return WARP, _BLOCK // WARP
    threads = _BLOCK if n <= _BLOCK * _HELD else 2 * _BLOCK
    return threads, 1


def held_in_registers(n: int) -> bool:
    """Whether each of a team's threads can hold its part of a row."""
    return -(-n // team(n)[0]) <= _HELD
