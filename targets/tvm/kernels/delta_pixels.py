"""What kernels of changed pixels have in common: of those that they computed, they send the ones that differ.

Maps are (N, H, W, C), float32, and a mask (N, H, W) has a byte a pixel, 1 where it changed. A place is the index of a
pixel. A kernel writes what it sends into its own state, which it is given as an input; the rest of it is not touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels.depthwise import at, pieces
from onnxcomp.targets.tvm.kernels.vector_math import total
from onnxcomp.targets.tvm.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is done to the pixels that a kernel computed.

    Attributes:
        shape: Of the output, (N, H, W, C).
        threshold: Root mean square of a pixel's change above which it is sent.
        rounds: Values are rounded to multiples of a step a channel, where that is above zero.
    """

    shape: tuple[int, int, int, int]
    threshold: float = 0.0
    rounds: bool = False

    @property
    def images(self) -> int:
        """How many there are."""
        return self.shape[0]

    @property
    def pixels(self) -> int:
        """Of all images."""
        return math.prod(self.shape[:3])

    @property
    def channels(self) -> int:
        """Of a pixel."""
        return self.shape[3]

    @property
    def limit(self) -> float:
        """Largest sum of squared changes that is not sent; below zero, everything is."""
        threshold = np.float32(self.threshold)
        return float(threshold * threshold * np.float32(self.channels)) if threshold >= 0 else -1.0

    @property
    def steps(self) -> int:
        """Length of the step that a kernel takes."""
        return self.channels if self.rounds else 1


def flat(buffer: Any) -> Any:
    """A buffer seen as one row of values."""
    size = math.prod(int(d) for d in buffer.shape)
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)


def kind(lanes: int) -> str:
    """Type of a float32 vector, or of one value."""
    return "float32" if lanes == 1 else f"float32x{lanes}"


def copy(machine: Machine, count: int) -> Any:
    """A macro that copies `count` float32 values; it takes target and its start, then source and start."""
    parts = pieces(machine.lanes, count)

    @T.inline
    def part(to, to_at, x, x_at, first, many, lanes):
        for v in T.serial(many):
            to[at(to_at + first + v * lanes, lanes)] = x[at(x_at + first + v * lanes, lanes)]

    @T.inline
    def rest(again, to, to_at, x, x_at, index):
        if index < len(parts):
            part(to, to_at, x, x_at, *parts[index])
            again(again, to, to_at, x, x_at, index + 1)

    @T.inline
    def run(to, to_at, x, x_at):
        rest(rest, to, to_at, x, x_at, 0)

    return run


def fill(machine: Machine, count: int) -> Any:
    """A macro that sets `count` float32 values to zero; it takes the buffer and the start."""
    parts = pieces(machine.lanes, count)

    @T.inline
    def part(to, to_at, first, many, lanes):
        for v in T.serial(many):
            to[at(to_at + first + v * lanes, lanes)] = T.float32(0) if lanes == 1 else T.broadcast(T.float32(0), lanes)

    @T.inline
    def rest(again, to, to_at, index):
        if index < len(parts):
            part(to, to_at, *parts[index])
            again(again, to, to_at, index + 1)

    @T.inline
    def run(to, to_at):
        rest(rest, to, to_at, 0)

    return run


def send(machine: Machine, stage: Stage) -> Any:
    """A macro that sends one pixel if it differs enough from what was sent last.

    Its arguments are the computed values and where they start, which are rounded in place, the place, the state, the
    mask, the step, and whether the stream has started: else it is sent in any case.
    """
    channels, limit = stage.channels, stage.limit
    parts = pieces(machine.lanes, channels)
    take = copy(machine, channels)
    whole = parts[0][1] if parts[0][2] == machine.lanes else 0
    narrow = parts[1:] if whole else parts
    lanes = machine.lanes
    always = limit < 0

    @T.inline
    def squares(values, start, held, place, sums, index, size):
        change: T.let = values[at(start + index, size)] - held[at(place * channels + index, size)]
        sums[0] = sums[0] + change * change

    @T.inline
    def ends(again, values, start, held, place, rest, index):
        if index < len(narrow):
            change: T.let = (
                values[at(start + narrow[index][0], narrow[index][2])]
                - held[at(place * channels + narrow[index][0], narrow[index][2])]
            )
            rest[0] = rest[0] + total(change * change)
            again(again, values, start, held, place, rest, index + 1)

    @T.inline
    def differs(values, start, held, place, flag):
        rest = T.alloc_buffer((1,), "float32", scope="local")
        rest[0] = T.float32(0)
        if whole > 0:
            sums = T.alloc_buffer((1,), f"float32x{lanes}", scope="local")
            sums[0] = T.broadcast(T.float32(0), lanes)
            squares(values, start, held, place, sums, 0, lanes)
            # The first channels tell of most pixels that they changed: a sum of squares does not fall again.
            flag[0] = T.Select(total(sums[0]) <= T.float32(limit), 0, 1)
            if flag[0] == 0:
                for v in T.serial(whole - 1):
                    squares(values, start, held, place, sums, (v + 1) * lanes, lanes)
                ends(ends, values, start, held, place, rest, 0)
                flag[0] = T.Select(total(sums[0]) + rest[0] <= T.float32(limit), 0, 1)
        else:
            ends(ends, values, start, held, place, rest, 0)
            flag[0] = T.Select(rest[0] <= T.float32(limit), 0, 1)

    def other(values: Any, start: Any, held: Any, place: Any, index: Any, size: int) -> Any:
        """1 where a value of a vector is not the one that was sent, or is NaN."""
        same = values[at(start + index, size)] == held[at(place * channels + index, size)]
        if size > 1:
            same = T.call_llvm_pure_intrin("bool", f"llvm.vector.reduce.and.v{size}i1", same)
        return T.Select(same, 0, 1)

    @T.inline
    def others(again, values, start, held, place, flag, index):
        if index < len(narrow):
            flag[0] = T.bitwise_or(flag[0], other(values, start, held, place, narrow[index][0], narrow[index][2]))
            again(again, values, start, held, place, flag, index + 1)

    @T.inline
    def differs_at_all(values, start, held, place, flag):
        flag[0] = 0
        if whole > 0:
            flag[0] = other(values, start, held, place, 0, lanes)
            if flag[0] == 0:
                for v in T.serial(whole - 1):
                    flag[0] = T.bitwise_or(flag[0], other(values, start, held, place, (v + 1) * lanes, lanes))
                others(others, values, start, held, place, flag, 0)
        else:
            others(others, values, start, held, place, flag, 0)

    @T.inline
    def run(values, start, place, held, mask, step, started):
        if stage.rounds:
            for c in T.serial(channels):
                values[start + c] = T.Select(
                    step[c] > T.float32(0),
                    T.nearbyint(values[start + c] / T.Select(step[c] > T.float32(0), step[c], T.float32(1))) * step[c],
                    values[start + c],
                )
        flag = T.alloc_buffer((1,), "int32", scope="local")
        flag[0] = 1
        if always:
            flag[0] = 1
        elif started:
            if limit > 0:
                differs(values, start, held, place, flag)
            else:
                differs_at_all(values, start, held, place, flag)
        if flag[0] != 0:
            take(held, place * channels, values, start)
            mask[place] = T.uint8(1)

    return run
