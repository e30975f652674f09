"""Sparse ops as dense products of onnxruntime that compute the same: for sparsity or batches where those are faster.

Weights stay what they are. Integers of 8 bits with a scale a column go into `MatMulNBits` one to one; 4-bit ones, whose
scales run along the other axis, are rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.blockwise import quantize_blocks
from onnxcomp.break_even import Product
from onnxcomp.edit import Editor, become, constant
from onnxcomp.ops import DOMAIN, FORMATS, OPS, Format
from onnxcomp.target import Array
from onnxcomp.targets.ort.trials import DENSE_BLOCK, MICROSOFT

MASKS = frozenset({"KeepAbove", "KeepLargest"})
"""Native ops that drop values, and multiply nothing."""

_NAMES = {"": "fp32", "Int8": "int8", "Int4": "int4"}


@dataclass(frozen=True)
class SparseCall:
    """A call of a sparse op, portable or native.

    Attributes:
        node: The node.
        op: `ThresholdMatMul`, `TopKMatMul` or `GatedMLP`.
        format: Of its weights.
        inputs: Rows of its weight, of the up projection of a gated MLP.
        outputs: Columns of it.
    """

    node: ir.Node
    op: str
    format: Format
    inputs: int
    outputs: int

    @property
    def product(self) -> Product:
        """What decides whether it pays."""
        family = "gated_mlp" if self.op == "GatedMLP" else "matmul"
        return Product(op=family, weights=_NAMES[self.format.suffix], inputs=self.inputs, outputs=self.outputs)


def sparse_call(node: ir.Node) -> SparseCall | None:
    """What a node calls, or None if it is no sparse op with a constant weight of known shape."""
    if node.op_type not in OPS or node.domain not in (native.DOMAIN, DOMAIN):
        return None
    suffix = next(f for f in sorted(_NAMES, key=len, reverse=True) if node.op_type.endswith(f))
    found = next(f for f in FORMATS if f.suffix == suffix)
    op = node.op_type.removesuffix(suffix)
    first = 2 if op == "GatedMLP" else 1
    for value in node.inputs[first : first + _parts(found) * (2 if op == "GatedMLP" else 1)]:
        if value is None or value.const_value is None or value.is_graph_input():
            return None
    shape = _shape(node.inputs[first], found)
    if op == "GatedMLP" and _turned(node, found):
        shape = shape[::-1]
    return SparseCall(node, op, found, *shape)


def to_dense(model: ir.Model, call: SparseCall) -> None:
    """Turns a sparse op into dense ones behind a mask; needs the native library for the mask."""
    node, inputs = call.node, list(call.node.inputs)
    assert isinstance(node.graph, ir.Graph)
    editor = Editor(model, node.graph)
    model.opset_imports.setdefault(native.DOMAIN, 1)
    name = node.name or call.op
    parts = _parts(call.format)
    one_sided = node.attributes.get_int("one_sided", 0)

    def own(op_type: str, given: list[ir.Value | None], attributes: dict[str, int], what: str) -> ir.Value:
        value = editor.before(node, op_type, given, name=f"{name}_{what}", like=given[0], attributes=attributes)
        producer = value.producer()
        assert producer is not None
        producer.domain = native.DOMAIN
        return value

    if call.op == "TopKMatMul":
        kept = own("KeepLargest", [inputs[0]], {"k": node.attributes["k"].as_int()}, "kept")
    else:
        kept = own("KeepAbove", [inputs[0], inputs[-1]], {"one_sided": one_sided}, "kept")
    if call.op == "GatedMLP":
        up = _Product(editor, call.format, inputs[2 : 2 + parts], f"{name}_up", turned=_turned(node, call.format))
        linear = editor.before(node, up.op_type, [inputs[1], *up.weights], name=f"{name}_up", attributes=up.attributes)
        producer = linear.producer()
        assert producer is not None
        producer.domain = up.domain
        kept = editor.before(node, "Mul", [kept, linear], name=f"{name}_hidden", like=kept)
        weight = inputs[2 + parts : 2 + 2 * parts]
    else:
        weight = inputs[1 : 1 + parts]
    down = _Product(editor, call.format, weight, name, turned=False)
    become(node, down.op_type, [kept, *down.weights], down.attributes, down.domain)
    if down.domain or (call.op == "GatedMLP" and up.domain):
        model.opset_imports.setdefault(MICROSOFT, 1)


def drop_unused(model: ir.Model) -> None:
    """Removes the weights of the main graph that nothing reads."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            model.graph.initializers.pop(name)


class _Product:
    """A dense product with the weight of a sparse op: `op_type`, `domain`, `weights`, `attributes`."""

    def __init__(
        self, editor: Editor, format: Format, parts: list[ir.Value | None], name: str, *, turned: bool
    ) -> None:
        self.op_type, self.domain = "MatMul", ""
        self.attributes: dict[str, int] = {}
        weight = parts[0]
        assert weight is not None
        if not format.suffix:
            self.weights = [weight]
            if turned:
                self.weights = [_ahead(editor, weight)]
            return
        rows, columns = _shape(weight, format)
        if turned:
            rows, columns = columns, rows
        blocks = -(-rows // DENSE_BLOCK)
        stored = _stored(format, parts, turned=turned)
        self.op_type, self.domain = "MatMulNBits", MICROSOFT
        self.attributes = {"K": rows, "N": columns, "bits": 8, "block_size": DENSE_BLOCK, "accuracy_level": 4}
        self.weights = [
            later(editor, f"{name}_blocks", lambda: stored()[0], ir.DataType.UINT8, (columns, blocks, DENSE_BLOCK)),
            later(editor, f"{name}_scales", lambda: stored()[1], ir.DataType.FLOAT, (columns, blocks)),
        ]


def _stored(format: Format, parts: list[ir.Value | None], *, turned: bool) -> Callable[[], tuple[Array, Array]]:
    """Integers and scales for MatMulNBits, (N, blocks, DENSE_BLOCK) and (N, blocks)."""

    def arrays() -> list[Array]:
        found = [constant(v) for v in parts]
        return [a for a in found if a is not None]

    def int8() -> tuple[Array, Array]:
        integers, scale = arrays()
        return int8_blocks(integers if turned else integers.T, scale)

    def int4() -> tuple[Array, Array]:
        matrix = format.dequantize(*arrays(), np.float32)
        found = quantize_blocks(matrix if turned else matrix.T, 8, DENSE_BLOCK, symmetric=True, method="rtn")
        return found.codes, found.scale

    return int8 if format.suffix == "Int8" else int4


def int8_blocks(integers: Array, scale: Array) -> tuple[Array, Array]:
    """8-bit integers with a scale an output, int8 (N, K) and (N,), as `MatMulNBits` takes them; no value changes.

    Returns:
        Integers, uint8 (N, blocks, DENSE_BLOCK), and scales, float32 (N, blocks).
    """
    padded = np.pad(integers, ((0, 0), (0, -integers.shape[1] % DENSE_BLOCK))).view(np.uint8) ^ np.uint8(128)
    blocks = padded.reshape(len(padded), -1, DENSE_BLOCK)
    return blocks, np.repeat(scale.astype(np.float32)[:, None], blocks.shape[1], axis=1)


def later(editor: Editor, name: str, read: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """An initializer that is computed when it is read."""
    value = editor.weight(name, np.zeros((0,) * len(shape), dtype.numpy()))
    value.shape = ir.Shape(shape)
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(read(), name=value.name), dtype=dtype, shape=ir.Shape(shape), name=value.name
    )
    return value


def _ahead(editor: Editor, weight: ir.Value) -> ir.Value:
    """The transposed weight, a new initializer."""
    assert weight.const_value is not None
    rows, columns = weight.const_value.shape.numpy()

    def read() -> Array:
        array = constant(weight)
        assert array is not None
        return np.ascontiguousarray(array.T)

    return later(editor, f"{weight.name}_columns", read, weight.dtype or ir.DataType.FLOAT, (columns, rows))


def _turned(node: ir.Node, format: Format) -> bool:
    """Whether the up projection of a gated MLP lies by neurons, (F, K)."""
    return node.domain == native.DOMAIN or format.suffix == "Int4"


def _parts(format: Format) -> int:
    return len(format.inputs.split(","))


def _shape(value: ir.Value | None, format: Format) -> tuple[int, int]:
    assert value is not None
    assert value.const_value is not None
    rows, columns = value.const_value.shape.numpy()
    return rows, columns * 2 if format.suffix == "Int4" else columns
