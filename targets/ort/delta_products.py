"""Products of held inputs as native ops that read the weights of changed inputs only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.edit import Editor, attribute, constant, redirect, replace_output, users
from onnxcomp.ops import SPARSITY
from onnxcomp.rewrite import Edit, applied, refused
from onnxcomp.target import Array
from onnxcomp.targets.ort.delta_states import StreamStates
from onnxcomp.targets.ort.dense_forms import later

_FEWEST_WEIGHTS = 1 << 15  # below that the runtime's own product takes no longer than comparing its inputs
_MOST_ROWS = 4  # of which each reads the weights anew
_MOST_CHANGED = 0.9


def lower_products(
    model: ir.Model, editor: Editor, states: StreamStates, hold: ir.Node, source: ir.Value, step: Array
) -> list[Edit]:
    """Lowers the products that read a held value; others read what the first of them sent.

    Args:
        model: The model.
        editor: Of its main graph.
        states: Its states.
        hold: The hold, of the main graph.
        source: The value before it, without rounding.
        step: Multiples of which it is rounded to; 0 for none.
    """
    held, last, started = hold.outputs[0], hold.inputs[1], hold.inputs[2]
    readers = [n for n in users(held) if n.graph is model.graph and _weight(n, held) is not None]
    if not readers:
        return []
    reason = _why_not(hold, source)
    if reason:
        return [refused(n, reason) for n in readers]
    assert last is not None
    assert started is not None
    level = constant(hold.inputs[3])
    assert level is not None
    assert source.shape is not None
    shape = tuple(int(d) for d in source.shape if isinstance(d, int))
    # In the first step everything is sent: no change is smaller than -1.
    numbers = [editor.weight("delta_level", np.ravel(v).astype(np.float32)) for v in (level, np.float32(-1), step)]
    threshold = editor.after(started, "Where", [started, *numbers[:2]], name=f"{held.name}_level", like=numbers[0])
    first: ir.Value | None = None
    for reader in readers:
        weight = _weight(reader, held)
        assert weight is not None
        size = weight.size
        total = states.new(f"{reader.name}_sum", (*shape[:-1], size[1]))
        own = last if first is None else states.new(f"{reader.name}_sent", shape)
        matrix = later(editor, f"{reader.name}_rows", weight.read, weight.dtype, size)
        parts = [matrix] if weight.scale is None else [matrix, weight.scale]
        outputs = [ir.Value(name=editor.free(f"{reader.name}_{what}")) for what in ("sum", "sent")]
        for value, length in zip(outputs, (size[1], shape[-1]), strict=True):
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([*shape[:-1], length])
        node = ir.node(
            "DeltaMatMul" if weight.scale is None else "DeltaMatMulInt8",
            [source, own, total, threshold, numbers[2], *parts], domain=native.DOMAIN, outputs=outputs,
            name=editor.free_node(f"{reader.name}_delta"),
        )  # fmt: skip
        node.metadata_props.update(reader.metadata_props)
        model.graph.insert_before(reader, node)
        _hand_over(editor, reader, outputs[0])
        states.put(total, outputs[0])
        if first is None:
            first = outputs[1]
            states.take_over(last, held, first, shape)
        else:
            states.put(own, outputs[1])
    assert first is not None
    _others(model, hold, first, readers)
    for reader in readers:
        model.graph.remove(reader, safe=True)
    model.graph.remove(hold, safe=True)
    return [applied(n, "reads the weights of changed inputs only") for n in readers]


def _others(model: ir.Model, hold: ir.Node, sent: ir.Value, readers: list[ir.Node]) -> None:
    """Lets the rest read what was sent; the nodes have to stand behind the op that sends it."""
    rest = [n for n in users(hold.outputs[0]) if n not in readers]
    if not rest:
        return
    producer = sent.producer()
    assert producer is not None
    model.graph.remove(producer)
    model.graph.insert_after(hold, producer)
    redirect(hold.outputs[0], sent, rest)


def _why_not(hold: ir.Node, source: ir.Value) -> str:
    if source.dtype != ir.DataType.FLOAT or source.shape is None or not all(isinstance(d, int) for d in source.shape):
        return "the kernel takes floats of a known shape"
    level = constant(hold.inputs[3])
    if level is None or level.size not in (1, int(source.shape.numpy()[-1])):
        return "its threshold is no constant for all inputs, or one for each"
    rows = math.prod(int(d) for d in source.shape.numpy()[:-1])
    if rows > _MOST_ROWS:
        return f"it has {rows} rows, of which each would read the weights anew"
    changed = 1 - float(hold.metadata_props.get(SPARSITY, 1.0))
    if changed > _MOST_CHANGED:
        return f"{changed:.0%} of its inputs change, and the kernel is faster up to {_MOST_CHANGED:.0%}"
    return ""


@dataclass(frozen=True)
class _Weight:
    """The weight of a product as a kernel takes it.

    Attributes:
        read: Reads it, `[K, N]`.
        size: K and N.
        dtype: Float or int8.
        scale: Of int8, float32 `[N]`.
    """

    read: Callable[[], Array]
    size: tuple[int, int]
    dtype: ir.DataType
    scale: ir.Value | None = None


def _weight(node: ir.Node, held: ir.Value) -> _Weight | None:
    """The constant weight of a product with `held` on its left; None if it is no such product, or a small one."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm") or node.inputs[0] is not held:
        return None
    turned = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    if node.op_type == "Gemm" and (
        attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1
    ):
        return None
    weight, scale = node.inputs[1], None
    producer = None if weight is None else weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        weight, scale = _integers(producer, 0 if turned else 1)
    kind = ir.DataType.FLOAT if scale is None else ir.DataType.INT8
    if weight is None or weight.dtype != kind or constant(weight) is None or weight.shape is None:
        return None
    size = [int(d) for d in weight.shape if isinstance(d, int)]
    if len(size) != 2 or size[0] * size[1] < _FEWEST_WEIGHTS:
        return None

    def read() -> Array:
        array = constant(weight)
        assert array is not None
        return np.ascontiguousarray(array.T) if turned else array

    return _Weight(read, (size[1], size[0]) if turned else (size[0], size[1]), kind, scale)


def _integers(node: ir.Node, axis: int) -> tuple[ir.Value | None, ir.Value | None]:
    """Integers and scale of a weight with one scale an output channel; nothing if it has another form."""
    scale = node.inputs[1]
    array = constant(scale)
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    given = int(attribute(node, "axis", 1))
    if array is None or array.ndim != 1 or given % 2 != axis or attribute(node, "block_size", 0):
        return None, None
    if array.dtype != np.float32 or (zero is not None and zero.any()):
        return None, None
    return node.inputs[0], scale


def _hand_over(editor: Editor, reader: ir.Node, total: ir.Value) -> None:
    """Gives the readers of a product its sum, with the bias of a Gemm."""
    output = reader.outputs[0]
    bias = reader.inputs[2] if reader.op_type == "Gemm" and len(reader.inputs) > 2 else None
    op_type, inputs = ("Identity", [total]) if bias is None else ("Add", [total, bias])
    is_output, readers = output.is_graph_output(), users(output)
    if bias is None and not is_output:
        redirect(output, total, readers)
        return
    result = editor.after(total, op_type, inputs, name=f"{output.name}_whole", like=output)
    redirect(output, result, readers)
    if is_output:
        replace_output(output, result)
