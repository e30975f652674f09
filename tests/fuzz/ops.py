"""What random graphs are made of: each maker adds an op, or a form that exporters write, to a graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from tests.fuzz.graphs import Graph, Shape

UNARY = ("Relu", "Abs", "Neg", "Sigmoid", "Tanh", "Identity", "LeakyRelu", "HardSigmoid", "Elu", "Softplus")


def unary(g: Graph) -> None:
    if x := g.value():
        g.op(g.pick(UNARY), [x], g.values[x])


def binary(g: Graph) -> None:
    """With a constant of any shape that broadcasts, on either side, or with another value."""
    x = g.value()
    if x is None:
        return
    shape = g.values[x]
    others = [v for v, s in g.values.items() if s == shape]
    op = g.pick(["Add", "Mul", "Sub", "Div", "Max", "Min"])
    if g.chance(30):
        g.op(op if op != "Div" else "Add", [x, g.pick(others)], shape)
        return
    sizes = [
        (),
        (1,),
        shape[-1:],
        (1,) * len(shape),
        tuple(d if i == 1 else 1 for i, d in enumerate(shape)),
        (1, *shape),
    ]
    array = g.array(g.pick(sizes))
    other = g.const(np.maximum(array, 0.5) if op == "Div" else array)
    pair = [x, other] if op == "Div" or g.chance(70) else [other, x]
    g.op(op, pair, tuple(np.broadcast_shapes(shape, array.shape)))


def clip(g: Graph) -> None:
    if not (x := g.value()):
        return
    low, high = g.pick([(0.0, 6.0), (-1.0, 1.0), (0.5, 0.2), (0.0, None), (None, 0.5)])
    if g.opset < 11:
        limits: dict[str, Any] = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
        g.op("Clip", [x], g.values[x], **limits)
    else:
        bounds = ["" if v is None else g.const(np.float32(v)) for v in (low, high)]
        g.op("Clip", [x, *bounds], g.values[x])


def matmul(g: Graph) -> None:
    if not (x := g.value()):
        return
    shape = g.values[x]
    if not shape:
        return  # a scalar
    known = [w for w in g.weights if len(w.dims) == 2 and w.dims[0] == shape[-1] and w.data_type == TensorProto.FLOAT]
    if known and g.chance(30):
        weight, columns = known[0].name, known[0].dims[1]
    elif g.chance(30):
        columns = 1 + g.draw(5)
        weight = g.op("Transpose", [g.const(g.array((columns, shape[-1])))], None, perm=[1, 0])
    else:
        columns = 1 + g.draw(5)
        weight = g.const(g.array((shape[-1], columns)))
    y = g.op("MatMul", [x, weight], (*shape[:-1], columns))
    if g.chance(50):
        bias = g.const(g.array((columns,)))
        g.op("Add", [y, bias] if g.chance(50) else [bias, y], g.values[y])


def gemm(g: Graph) -> None:
    if not (x := g.value(2)):
        return
    rows, depth = g.values[x]
    columns, trans_a, trans_b = 1 + g.draw(5), g.chance(20), g.chance(50)
    if trans_a:
        rows, depth = depth, rows
    weight = g.const(g.array((columns, depth) if trans_b else (depth, columns)))
    bias = (
        [g.const(g.array(g.pick([(columns,), (1, columns), (), (rows, columns)])))]
        if g.chance(60) or g.opset < 11
        else []
    )
    extra: dict[str, Any] = {"alpha": 0.5} if g.chance(20) else {}
    extra |= {"beta": 2.0} if g.chance(20) else {}
    y = g.op("Gemm", [x, weight, *bias], (rows, columns), transA=int(trans_a), transB=int(trans_b), **extra)
    if g.chance(30):
        norm(g, y, columns)


def conv(g: Graph) -> None:
    if not (x := g.value(4)):
        return
    n, channels, height, width = g.values[x]
    group = g.pick([1, 1, channels])
    out, kernel, stride = group * (1 + g.draw(3)), g.pick([1, 2, 3]), g.pick([1, 1, 2])
    pads = g.pick([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    attributes: dict[str, Any] = {"pads": pads}
    if g.chance(20):
        before = [0, 0, g.draw(2), 1, 0, 0, 1, g.draw(2)]
        height, width = height + before[2] + before[6], width + before[3] + before[7]
        x = pad(g, x, before, (n, channels, height, width))
    if min(height, width) < kernel:
        return
    sizes = [(d + pads[i] + pads[i + 2] - kernel) // stride + 1 for i, d in enumerate((height, width))]
    if g.chance(20):
        attributes = {"auto_pad": g.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])}
        same = attributes["auto_pad"] != "VALID"
        sizes = [math.ceil(d / stride) if same else (d - kernel) // stride + 1 for d in (height, width)]
    weight = g.const(g.array((out, channels // group, kernel, kernel)))
    bias = g.pick([[], [""], [g.const(g.array((out,)))]])
    y = g.op("Conv", [x, weight, *bias], (n, out, *sizes), group=group, strides=[stride] * 2, **attributes)
    if g.chance(40):
        norm(g, y, out)


def norm(g: Graph, x: str, channels: int) -> None:
    parameters = [g.const(np.abs(g.array((channels,))) + np.float32(0.1)) for _ in range(4)]
    g.op("BatchNormalization", [x, *parameters], g.values[x])


def pad(g: Graph, x: str, pads: list[int], shape: Shape) -> str:
    if g.opset < 11:
        return str(g.op("Pad", [x], shape, pads=pads))
    return str(g.op("Pad", [x, g.const(np.array(pads, np.int64))], shape))


def pool(g: Graph) -> None:
    x = g.value(4)
    if x is None or min(g.values[x][2:]) < 2:
        return
    n, c, height, width = g.values[x]
    op = g.pick(["MaxPool", "AveragePool", "GlobalAveragePool"])
    if op == "GlobalAveragePool":
        g.op(op, [x], (n, c, 1, 1))
    else:
        g.op(op, [x], (n, c, height // 2, width // 2), kernel_shape=[2, 2], strides=[2, 2])


def reshape(g: Graph) -> None:
    """To a constant shape, with 0 and -1, or to one that is computed from the shape of a value."""
    if not (x := g.value()):
        return
    shape = g.values[x]
    rows = [(shape[0], math.prod(shape[1:]))] if shape else []
    target: Shape = g.pick([(math.prod(shape),), *rows, (1, *shape), shape])
    if g.chance(30) and len(shape) > 1:
        size = g.op("Shape", [x], None)
        first = g.op("Gather", [size, g.const(np.array([0], np.int64))], None, axis=0)
        rest = g.const(np.array([-1], np.int64))
        target = (shape[0], math.prod(shape[1:]))
        g.op("Reshape", [x, g.op("Concat", [first, rest], None, axis=0)], target)
        return
    wish = list(target)
    if target and g.chance(40):
        wish[g.draw(len(wish))] = -1
    if shape and target and g.chance(30) and target[0] == shape[0]:
        wish[0] = 0
    g.op("Reshape", [x, g.const(np.array(wish, np.int64))], target)


def move(g: Graph) -> None:
    """Transpose, Flatten, Squeeze, Unsqueeze, Expand, Tile."""
    if not (x := g.value()):
        return
    shape = g.values[x]
    op = g.pick(["Transpose", "Flatten", "Unsqueeze", "Squeeze", "Expand", "Tile"])
    if op == "Transpose":
        order = [int(i) for i in np.random.default_rng(g.draw(99)).permutation(len(shape))]
        g.op(op, [x], tuple(shape[i] for i in order), perm=order)
    elif op == "Flatten":
        axis = g.draw(len(shape) + 1)
        g.op(op, [x], (math.prod(shape[:axis]), math.prod(shape[axis:])), axis=axis)
    elif op == "Unsqueeze" and len(shape) < 5:
        axis = g.draw(len(shape) + 1)
        g.axes(op, x, [axis], (*shape[:axis], 1, *shape[axis:]))
    elif op == "Squeeze" and 1 in shape[1:]:
        axis = shape.index(1, 1)
        g.axes(op, x, [axis], shape[:axis] + shape[axis + 1 :])
    elif op == "Expand":
        g.op(op, [x, g.const(np.array(g.pick([shape, (1, *shape), (1,)]), np.int64))], None)
    elif op == "Tile":
        g.op(op, [x, g.const(np.array([1] * (len(shape) - 1) + [2], np.int64))], (*shape[:-1], 2 * shape[-1]))


def cut(g: Graph) -> None:
    """Slice, Gather, Concat, Split, and the two halves of a gated unit."""
    if not (x := g.value()):
        return
    shape = g.values[x]
    size, lead = shape[-1], shape[:-1]
    kind = g.pick(["Gather", "Concat", "Split", "Slice", "halves"])
    if kind == "Gather":
        index = np.array(g.pick([[0], [size - 1, 0], -1]), np.int64)
        g.op(kind, [x, g.const(index)], (*lead, *index.shape), axis=len(shape) - 1)
    elif kind == "Concat":
        g.op(kind, [x, x], (*lead, 2 * size), axis=-1 if g.opset >= 11 else len(shape) - 1)
    elif kind == "Split" and size > 1 and g.opset >= 13:
        first, second = g.op(kind, [x, g.const(np.array([1, size - 1], np.int64))], None, outputs=2, axis=-1)
        g.add(first, (*lead, 1))
        g.add(second, (*lead, size - 1))
    elif kind == "Slice" and g.opset >= 10:
        ends = [
            g.const(np.array([v], np.int64)) for v in g.pick([(0, 1), (0, 1 << 40), (-1, 1 << 62), (0, (1 << 63) - 1)])
        ]
        steps = [g.const(np.array([1], np.int64))] if g.chance(50) else []
        g.op(kind, [x, *ends, g.const(np.array([-1], np.int64)), *steps], None)
    elif kind == "halves" and size > 1 and g.opset >= 10:
        bounds = [g.const(np.array([v], np.int64)) for v in (0, size // 2, size, -1)]
        a = g.op("Slice", [x, bounds[0], bounds[1], bounds[3]], (*lead, size // 2))
        b = g.op("Slice", [x, bounds[1], bounds[2], bounds[3]], (*lead, size - size // 2))
        if size % 2 == 0:
            g.op("Mul", [a, g.op("Sigmoid", [b], g.values[b])], g.values[a])


def reduce(g: Graph) -> None:
    x = g.value()
    if x is None or len(g.values[x]) < 2:
        return
    shape = g.values[x]
    op = g.pick(["ReduceMean", "ReduceSum", "ReduceMax"])
    g.axes(op, x, [len(shape) - 1], (*shape[:-1], 1), since=13 if op == "ReduceSum" else 18, keepdims=1)


def layer_norm(g: Graph) -> None:
    if not (x := g.value()):
        return
    size = g.values[x][-1:]
    if g.opset >= 17:
        g.op("LayerNormalization", [x, g.const(g.array(size)), g.const(g.array(size))], g.values[x], axis=-1)
    elif len(g.values[x]) == 2 or g.opset >= 13:
        g.op("Softmax", [x], g.values[x], axis=-1)


def dropout(g: Graph) -> None:
    if not (x := g.value()):
        return
    if g.opset < 12:
        g.op("Dropout", [x], g.values[x], ratio=0.3)
    else:
        ratio = numpy_helper.from_array(np.float32(0.3), g.name("w"))  # onnxruntime wants it initialized
        g.weights.append(ratio)
        g.op("Dropout", [x, ratio.name], g.values[x])


def fold_me(g: Graph) -> None:
    """A computation on constants only."""
    x = g.value()
    if x is None or not g.values[x]:
        return
    a, b = g.const(g.array(())), g.const(g.array((g.values[x][-1],)))
    g.op("Mul", [x, g.op("Sqrt", [g.op("Abs", [g.op("Add", [a, b], None)], None)], None)], g.values[x])


def quantized(g: Graph) -> None:
    """A Q/DQ pair, as another tool may have left it."""
    x = "x0"  # exact in both models: next to an inexact one, a rounding would turn the last digit into a step
    if g.opset < 13 or g.outer is not None:
        return
    scale, zero = g.const(np.float32(0.05)), g.const(np.uint8(128))
    q = g.op("QuantizeLinear", [x, scale, zero], None)
    g.op("DequantizeLinear", [q, scale, zero], g.values[x])


BODY: list[Callable[[Graph], None]] = [unary, binary, clip, matmul, gemm, conv, reshape, move, cut, fold_me, dropout]
