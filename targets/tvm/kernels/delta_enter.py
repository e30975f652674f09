"""Frames of a stream: which of their pixels differ from what was sent last."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels.delta_pixels import Stage, flat, send
from onnxcomp.targets.tvm.kernels.delta_places import clear
from onnxcomp.targets.tvm.machine import Machine

_FEW = 4
"""Channels up to which squares are summed for many pixels at once."""

_BLOCK = 64
"""Pixels that are brought together."""

_TASK = 64
"""Blocks that a thread takes at once."""


@cache
def enter(machine: Machine, *, stage: Stage) -> Any:
    """Kernel `(x (N, C, H, W), held, started () bool, step, sent)`, which updates `held` and fills the mask `sent`.

    Args:
        machine: What it is for.
        stage: Of the output.
    """
    images, height, width, channels = stage.shape
    plane = height * width
    blocks = -(-plane // _BLOCK)
    tasks = -(-blocks // _TASK)
    deliver = send(machine, stage)
    reset = clear(stage.pixels)
    few = channels <= _FEW and not stage.rounds and stage.threshold > 0  # a small change has a square of 0

    @T.inline
    def gather(x, values, image, first, some):
        for c in T.serial(channels):
            for i in T.serial(some):
                values[i * channels + c] = x[(image * channels + c) * plane + first + i]

    @T.inline
    def few_channels(x, held, sent, values, image, first, some, started):
        """The block is looked at as a whole, since most of them have no change."""
        squares = T.alloc_buffer((_BLOCK,), "float32")
        marks = T.alloc_buffer((1,), "int32", scope="local")
        for i in T.serial(some):
            squares[i] = T.float32(0)
            for c in T.unroll(channels):
                change = (
                    x[(image * channels + c) * plane + first + i] - held[(image * plane + first + i) * channels + c]
                )
                squares[i] = squares[i] + change * change
        marks[0] = T.Select(started, 0, 1)
        for i in T.serial(some):
            marks[0] = T.bitwise_or(marks[0], T.Select(squares[i] <= T.float32(stage.limit), 0, 1))
        if marks[0] != 0:
            for i in T.serial(some):
                flag = T.alloc_buffer((1,), "int32", scope="local")
                flag[0] = T.Select(squares[i] <= T.float32(stage.limit), 0, 1)
                if started:
                    marks[0] = flag[0]
                else:
                    marks[0] = 1
                if marks[0] != 0:
                    for c in T.unroll(channels):
                        held[(image * plane + first + i) * channels + c] = x[(image * channels + c) * plane + first + i]
                    sent[image * plane + first + i] = T.uint8(1)

    @T.prim_func
    def kernel(x_: T.handle, h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x_shaped = T.match_buffer(x_, (images, channels, height, width), "float32")
        held_shaped = T.match_buffer(h_, stage.shape, "float32")
        started_shaped = T.match_buffer(f_, (), "bool")
        step = T.match_buffer(q_, (stage.steps,), "float32")
        sent_shaped = T.match_buffer(s_, stage.shape[:3], "uint8")
        x = flat(x_shaped)
        held = flat(held_shaped)
        started = flat(started_shaped)
        sent = flat(sent_shaped)
        reset(sent)
        for task in T.parallel(images * tasks):
            values = T.alloc_buffer((_BLOCK * channels,), "float32")
            image = task // tasks
            for block in T.serial(T.min(_TASK, blocks - task % tasks * _TASK)):
                first = (task % tasks * _TASK + block) * _BLOCK
                some = T.min(_BLOCK, plane - first)
                if few:
                    few_channels(x, held, sent, values, image, first, some, started[0])
                else:
                    gather(x, values, image, first, some)
                    for i in T.serial(some):
                        deliver(values, i * channels, image * plane + first + i, held, sent, step, started[0])

    return kernel
