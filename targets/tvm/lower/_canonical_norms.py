"""Finds LayerNormalization and RMSNormalization over the last axis, as ops and as they are spelled with others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, sole_reader, users


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation.

    Attributes:
        last: The node whose output is its output.
        source: What is normalised.
        scale: Constant or computed, of the last axis' size; None for ones.
        bias: Likewise; None if there is none.
        epsilon: Added to the variance or mean square.
        centred: Whether the mean is subtracted.
        n: Values that are normalised together.
    """

    last: ir.Node
    source: ir.Value
    scale: ir.Value | None
    bias: ir.Value | None
    epsilon: float
    centred: bool
    n: int


def find(node: ir.Node) -> Norm | None:
    """The normalisation that `node` is, or whose root it takes."""
    if node.domain:
        return None
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        return _op(node)
    if node.op_type == "Sqrt":
        return _spelled(node, node.outputs[0], inverse=False)
    if node.op_type == "Pow" and _number(node.inputs[1]) == -0.5:
        return _spelled(node, node.outputs[0], inverse=True)
    return None


def _op(node: ir.Node) -> Norm | None:
    source, scale = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if source is None or scale is None or source.dtype != ir.DataType.FLOAT or any(v.uses() for v in node.outputs[1:]):
        return None
    axis = attribute(node, "axis", -1)
    shape = scale.shape
    if source.shape is None or shape is None or not shape.is_static():
        return None
    if shape.rank() != (-axis if axis < 0 else source.shape.rank() - axis):
        return None
    if bias is not None and bias.shape != shape:
        return None
    return Norm(
        last=node,
        source=source,
        scale=scale,
        bias=bias,
        epsilon=attribute(node, "epsilon", 1e-5),
        centred=node.op_type == "LayerNormalization",
        n=int(np.prod(shape.numpy())),
    )


def _spelled(root: ir.Node, value: ir.Value, *, inverse: bool) -> Norm | None:
    shifted = root.inputs[0]
    add = None if shifted is None else shifted.producer()
    if add is None or add.op_type != "Add" or add.domain:
        return None
    variance, epsilon = _with_number(add)
    square = _averaged(variance)
    base = None if square is None else _squared(square)
    if base is None or epsilon is None or base.dtype != ir.DataType.FLOAT:
        return None
    centre = _centred(base)
    source = base if centre is None else centre
    normal = _normal(base, value, inverse=inverse)
    n = source.shape[-1] if source.shape is not None and source.shape.rank() else None
    if normal is None or not isinstance(n, int):
        return None
    last, scale = _behind(normal, "Mul", n)
    last, bias = (last, None) if centre is None else _behind(last, "Add", n)
    return Norm(last=last, source=source, scale=scale, bias=bias, epsilon=epsilon, centred=centre is not None, n=n)


def _normal(base: ir.Value, root: ir.Value, *, inverse: bool) -> ir.Node | None:
    """The node that divides `base` by the root."""
    for reader in users(root):
        if reader.domain or reader.graph is not base.graph:
            continue
        if not inverse and reader.op_type == "Div":
            if reader.inputs[1] is root and _same(reader.inputs[0], base):
                return reader
            if _number(reader.inputs[0]) == 1:
                return _normal(base, reader.outputs[0], inverse=True)
        if not inverse and reader.op_type == "Reciprocal":
            return _normal(base, reader.outputs[0], inverse=True)
        if inverse and reader.op_type == "Mul" and any(_same(v, base) for v in reader.inputs if v is not root):
            return reader
    return None


def _behind(node: ir.Node, op_type: str, n: int) -> tuple[ir.Node, ir.Value | None]:
    """The next node if it combines each row with a constant of `n` values, and this constant."""
    reader = sole_reader(node.outputs[0])
    if reader is None or reader.domain or reader.op_type != op_type:
        return node, None
    other = next((v for v in reader.inputs if v is not node.outputs[0]), None)
    array = constant(other)
    if array is None or array.dtype != np.float32 or array.shape[-1:] != (n,) or array.size != n:
        return node, None
    return reader, other


def _averaged(value: ir.Value | None) -> ir.Value | None:
    """What `value` is the mean over the last axis of."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "ReduceMean" or node.domain or not attribute(node, "keepdims", 1):
        return None
    axes = attribute(node, "axes")
    if axes is None:
        given = constant(node.inputs[1] if len(node.inputs) > 1 else None)
        axes = None if given is None else given.tolist()
    source = node.inputs[0]
    rank = None if source is None or source.shape is None else source.shape.rank()
    return source if rank and axes is not None and list(axes) in ([-1], [rank - 1]) else None


def _squared(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    if node is None or node.domain:
        return None
    if (node.op_type == "Pow" and _number(node.inputs[1]) == 2) or (
        node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    ):
        return node.inputs[0]
    return None


def _centred(value: ir.Value) -> ir.Value | None:
    """x, if `value` is x less its mean."""
    node = value.producer()
    if node is None or node.op_type != "Sub" or node.domain:
        return None
    return node.inputs[0] if _averaged(node.inputs[1]) is node.inputs[0] else None


def _same(a: ir.Value | None, b: ir.Value) -> bool:
    """Whether two values are one, or the same difference: some exporters compute it twice."""
    if a is b or a is None:
        return a is b
    first, second = _centred(a), _centred(b)
    return first is not None and first is second


def _with_number(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    """The operand that is no constant number, and the number."""
    first, second = node.inputs
    number = _number(second)
    return (first, number) if number is not None else (second, _number(first))


def _number(value: ir.Value | None) -> float | None:
    array = constant(value) if value is not None and ir.convenience.get_const_tensor(value) is not None else None
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None
