"""Ops between a dequantizer and a quantizer that work on codes: sums, products, tables, means, and moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnxcomp.edit import Editor, attribute, constant, sole_reader
from onnxcomp.target import Array
from onnxcomp.targets.tvm.lower import _integer_reading as reading
from onnxcomp.targets.tvm.lower._integer_nodes import become, images, insert
from onnxcomp.targets.tvm.nodes import replace

MOVES = frozenset(
    ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "DepthToSpace", "SpaceToDepth", "MaxPool")
)
"""Ops that commute with a quantizer of one scale; it is their first input that they move."""

CURVES = frozenset(
    (
        *("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "Erf", "Exp"),
        *("Softplus", "Softsign", "Mish", "Abs", "Neg", "Sqrt", "Clip", "PRelu", "Pow", "Celu", "ThresholdedRelu"),
    )
)
"""Ops of one tensor, value by value, with constants as other inputs."""


def hoist(editor: Editor, node: ir.Node) -> bool:
    """Moves a QuantizeLinear before ops that only move values, as far as it goes; returns whether it moved."""
    moved = False
    while (mover := node.inputs[0].producer() if node.inputs[0] is not None else None) is not None:
        plain = not mover.domain and mover.op_type in MOVES and len(mover.outputs) == 1
        if not plain or sole_reader(mover.outputs[0]) is not node or reading.quantizer(node) is None:
            break
        dtype, source = node.outputs[0].dtype, mover.inputs[0]
        if dtype is None or source is None or source.dtype != ir.DataType.FLOAT:
            break
        codes = editor.before(
            mover, "QuantizeLinear", [source, *node.inputs[1:]], name=f"{node.name}_early", like=source, dtype=dtype
        )
        quantizer = codes.producer()
        assert quantizer is not None
        node.op_type = mover.op_type
        inputs = [codes, *mover.inputs[1:]]
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        node.attributes.clear()
        for found in mover.attributes.values():
            node.attributes.add(found)
        editor.graph.remove(mover, safe=True)
        node, moved = quantizer, True
    return moved


def total(editor: Editor, node: ir.Node) -> str | None:
    """Makes an Add or Mul of two quantized tensors of one shape a node of ours.

    Returns:
        Why not; None if it was done; empty if it is not quantized.
    """
    a, b = (reading.source(value) for value in node.inputs)
    sink = reading.sink(node.outputs[0])
    if a is None or b is None or sink is None:
        return ""
    if a.dtype != b.dtype or not _same_shape(a.codes, b.codes):
        return "its operands differ in type or shape"
    if node.op_type == "Mul":
        scale = np.float32(np.float32(a.scale * b.scale) / sink.scale)
        own = {"zeros": (a.zero, b.zero), "scale": float(scale)}
        become(sink.last, node, "QMul", [a.codes, b.codes], own | sink.attributes)
        return None
    first, second = np.float32(a.scale / sink.scale), np.float32(b.scale / sink.scale)
    # As ONNX Runtime computes it, rounding for rounding: a fused multiply-add, then a difference.
    moved = np.float32(np.float64(first) * a.zero + np.float64(np.float32(second * np.float32(b.zero))))
    offset = np.float32(np.float32(sink.zero) - moved)
    own_sum = {"ratios": (float(first), float(second)), "offset": float(offset)}
    become(sink.last, node, "QAdd", [a.codes, b.codes], own_sum | sink.attributes)
    return None


def curve(editor: Editor, node: ir.Node) -> str | None:
    """Makes an op of one quantized tensor a table; returns what `total` returns."""
    x, sink = reading.source(node.inputs[0]), reading.sink(node.outputs[0])
    if x is None or sink is None:
        return ""
    others = [constant(value) for value in node.inputs[1:]]
    if any(value is not None and (c is None or c.size != 1) for value, c in zip(node.inputs[1:], others, strict=True)):
        return "it has an input that is no number"
    values = (_every_code(x.dtype) - np.float32(x.zero)) * x.scale
    table = _table(_evaluated(node, values, others), sink)
    become(sink.last, node, "QTable", [x.codes, editor.weight(f"{node.name}_table", table)], {})
    return None


def requantized(editor: Editor, node: ir.Node) -> str | None:
    """Makes a QuantizeLinear right behind a DequantizeLinear a table, or nothing where they agree."""
    x, sink = reading.source(node.inputs[0]), reading.quantizer(node)
    if x is None or sink is None:
        return ""
    if (x.scale, x.zero, x.dtype) == (sink.scale, sink.zero, sink.dtype):
        node.op_type = "Identity"
        node.resize_inputs(1)
        node.replace_input_with(0, x.codes)
        node.attributes.clear()
        return None
    table = _changed(x, sink)
    become(node, node, "QTable", [x.codes, editor.weight(f"{node.name}_table", table)], {})
    return None


def joined(editor: Editor, node: ir.Node) -> str | None:
    """Makes a Concat of quantized tensors one of codes; returns what `total` returns."""
    parts, sink = [reading.source(value) for value in node.inputs], reading.sink(node.outputs[0])
    if sink is None or any(part is None for part in parts):
        return ""
    inputs = []
    for index, part in enumerate(parts):
        assert part is not None
        same = (part.scale, part.zero, part.dtype) == (sink.scale, sink.zero, sink.dtype)
        if same and (sink.low, sink.high) == reading.limits(sink.dtype):
            inputs.append(part.codes)
            continue
        table = editor.weight(f"{node.name}_table_{index}", _changed(part, sink))
        inputs.append(
            insert(
                editor,
                sink.last,
                node,
                "QTable",
                [part.codes, table],
                {},
                dtype=ir.DataType[sink.dtype.upper()],
                shape=part.codes.shape,
            )
        )
    axis = attribute(node, "axis")
    sink.last.op_type = "Concat"
    sink.last.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        sink.last.replace_input_with(index, value)
    sink.last.attributes.clear()
    sink.last.attributes.add(ir.AttrInt64("axis", axis))
    return None


def mean(editor: Editor, node: ir.Node) -> str | None:
    """Makes a mean over a quantized image a node of ours; returns what `total` returns."""
    x = reading.source(node.inputs[0])
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if x is None or shape is None or len(shape) != 4:
        return ""
    if node.op_type == "ReduceMean":
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
        if axes is None or sorted(int(a) % 4 for a in axes) != [2, 3] or not attribute(node, "keepdims", 1):
            return "it is no mean over height and width that keeps the rank"
    if not all(isinstance(d, int) for d in shape[1:]):
        return "its image has no fixed size"
    sink = reading.sink(node.outputs[0])
    pixels = np.float32(int(shape[2]) * int(shape[3]))  # type: ignore[arg-type]
    # In this order ONNX Runtime rounds.
    scale = x.scale / pixels if sink is None else x.scale / np.float32(sink.scale * pixels)
    own = {"x_zero": x.zero, "scale": float(np.float32(scale))}
    attributes = {"dtype": "float32"} if sink is None else sink.attributes
    images(editor, node, node if sink is None else sink.last, "QMean", x.codes, [], own | attributes)
    return None


def rest(node: ir.Node) -> bool:
    """Makes a quantizer or dequantizer of one scale that nothing took a node of ours."""
    if node.op_type == "QuantizeLinear":
        sink = reading.quantizer(node)
        if sink is None or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.FLOAT:
            return False
        replace(node, "Quantize", [node.inputs[0]], {"scale": float(sink.scale)} | sink.attributes)
        return True
    x = reading.source(node.outputs[0])
    if x is None:
        return False
    replace(node, "Dequantize", [x.codes], {"scale": float(x.scale), "zero": x.zero})
    return True


def _every_code(dtype: str) -> Array:
    """All codes in the order of their bytes."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def _changed(x: reading.Source, sink: reading.Sink) -> Array:
    return _table((_every_code(x.dtype) - np.float32(x.zero)) * x.scale, sink)


def _table(values: Array, sink: reading.Sink) -> Array:
    with np.errstate(all="ignore"):
        codes = np.rint(np.nan_to_num(values.astype(np.float32) / sink.scale)) + sink.zero
    return np.asarray(np.clip(codes, sink.low, sink.high).astype(sink.dtype))


def _evaluated(node: ir.Node, values: Array, others: Sequence[Array | None]) -> Array:
    """Output of a node for given values and constants."""
    names = ["x"] + ["" if other is None else f"c{i}" for i, other in enumerate(others)]
    alone = ir.to_proto(node)
    del alone.input[:], alone.output[:]
    alone.input.extend(names)
    alone.output.append("y")
    graph = onnx.helper.make_graph(
        [alone],
        "curve",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, values.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, values.shape)],
        [onnx.numpy_helper.from_array(c, n) for c, n in zip(others, names[1:], strict=True) if c is not None],
    )
    version = node.version or (node.graph.opset_imports[""] if isinstance(node.graph, ir.Graph) else 21)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    with np.errstate(all="ignore"):
        outputs: Any = ReferenceEvaluator(model).run(None, {"x": values})
    return np.asarray(outputs[0])


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    known = not any(isinstance(d, ir.SymbolicDim) and d.value is None for d in a.shape)
    return known and all(x == y for x, y in zip(a.shape, b.shape, strict=True))
