"""Products with a constant matrix in every form that exporters and quantizers write them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.blockwise import Blocks, unpack
from onnxcomp.edit import attribute, constant, in_main_graph, sole_reader
from onnxcomp.model import all_nodes
from onnxcomp.passes._bias import added_constant
from onnxcomp.target import Array

_STANDARD = ("", "ai.onnx")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A product `x @ W + bias` with a constant matrix.

    Attributes:
        node: The product.
        source: `x`.
        output: What comes out, bias included.
        bias: The bias, or None.
        inputs: K, channels of `x`.
        outputs: N, channels of the output.
        dtype: Element type of a float weight; None where the weight is quantized.
    """

    node: ir.Node
    source: ir.Value
    output: ir.Value
    bias: ir.Value | None
    inputs: int
    outputs: int
    dtype: ir.DataType | None

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored in integers."""
        return self.dtype is None

    @property
    def direct(self) -> ir.Value | None:
        """The weight, if it is a float constant stored as (inputs, outputs)."""
        weight = self.node.inputs[1]
        plain = self.node.op_type == "MatMul" or (self.node.op_type == "Gemm" and not attribute(self.node, "transB", 0))
        return weight if plain and _tensor(weight) is not None else None

    def matrix(self) -> Array:
        """The weight, float32 `(inputs, outputs)`, read anew every time."""
        matrix = _matrix(self.node)
        assert matrix is not None
        return np.asarray(matrix, np.float32)

    def row_norms(self) -> Array:
        """Norm of the weights that read each input channel, float32 `(inputs,)`."""
        return np.asarray(np.linalg.norm(self.matrix(), axis=1), np.float32)


def find_dense(model: ir.Model) -> tuple[list[Dense], dict[ir.Node, str]]:
    """All products with a constant matrix in the main graph, in order, and why other products are none."""
    found: list[Dense] = []
    reasons: dict[ir.Node, str] = {}
    within = {node for function in model.functions.values() for node in function.all_nodes()}
    for node in all_nodes(model):
        if (node.op_type, node.domain) == ("MatMulNBits", "com.microsoft") or (
            node.op_type in ("MatMul", "Gemm") and node.domain in _STANDARD
        ):
            dense: Dense | str
            if node in within:
                dense = "it stands in a function; the pass cleanup writes functions out"
            elif not in_main_graph(model, node):
                dense = "it stands in a subgraph, whose values calibration cannot observe"
            else:
                dense = _read(node)
            if isinstance(dense, str):
                reasons[node] = dense
            else:
                found.append(dense)
    return found, reasons


def _read(node: ir.Node) -> Dense | str:
    source = node.inputs[0]
    if source is None:
        return "an input is missing"
    if node.op_type == "MatMulNBits":
        if attribute(node, "bits", 4) not in (2, 4, 8) or any(v is not None for v in node.inputs[4:5]):
            return "its block-wise weight is stored in a form that is not known here"
        sizes: tuple[int, ...] = (int(attribute(node, "K", 0)), int(attribute(node, "N", 0)))
        bias, dtype = node.inputs[5] if len(node.inputs) > 5 else None, None
        if constant(node.inputs[1]) is None:
            return "its weight is not constant"
    else:
        if node.op_type == "Gemm" and _odd(node):
            return "Gemm with alpha, beta or transA"
        tensor, turned = _stored(node)
        if tensor is None:
            return "its second input is no constant weight"
        if len(tensor.shape) != 2:
            return f"its weight has {len(tensor.shape)} dimensions"
        quantized = _dequantizer(node.inputs[1]) is not None
        if not quantized and tensor.dtype not in _FLOATS:
            return f"its weight is {tensor.dtype.name.lower()}, not float32 or float16"
        sizes = tuple(tensor.shape.numpy())[:: -1 if turned else 1]
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        dtype = None if quantized else tensor.dtype
    output = node.outputs[0]
    if bias is None and (added := _added(output)) is not None:
        bias, output = added
    return Dense(
        node=node, source=source, output=output, bias=bias, inputs=sizes[0], outputs=sizes[1], dtype=dtype
    )  # fmt: skip


def _odd(node: ir.Node) -> bool:
    scaled = attribute(node, "alpha", 1.0) != 1.0 or (len(node.inputs) > 2 and attribute(node, "beta", 1.0) != 1.0)
    return scaled or bool(attribute(node, "transA", 0))


def _added(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The bias that an Add, the only reader, adds to `value`, and the output of that Add."""
    reader = sole_reader(value)
    bias = None if reader is None else added_constant(reader, value)
    return None if bias is None else (bias.value, bias.user.outputs[0])


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a weight comes from, a Transpose behind it passed."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _stored(node: ir.Node) -> tuple[ir.TensorProtocol | None, bool]:
    """The constant behind a weight as it is stored, and whether that is (outputs, inputs)."""
    value = node.inputs[1]
    turned = bool(node.op_type == "Gemm" and attribute(node, "transB", 0))
    for _ in range(3):
        if (tensor := _tensor(value)) is not None or value is None:
            return tensor, turned
        producer = value.producer()
        if producer is None or producer.op_type not in ("Transpose", "DequantizeLinear"):
            return None, turned
        if producer.op_type == "Transpose":
            if list(attribute(producer, "perm", [1, 0])) != [1, 0]:
                return None, turned
            turned = not turned
        value = producer.inputs[0]
    return None, turned


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    if value is None or (value.is_graph_input() and value.is_initializer()):
        return None
    return ir.convenience.get_const_tensor(value)


def _matrix(node: ir.Node) -> Array | None:
    if node.op_type == "MatMulNBits":
        return _from_blocks(node)
    value, turned = node.inputs[1], bool(node.op_type == "Gemm" and attribute(node, "transB", 0))
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value, turned = producer.inputs[0], not turned
        producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        array = _dequantize(producer)
    else:
        array = constant(value)
    return None if array is None else array.T if turned else array


def _dequantize(node: ir.Node) -> Array | None:
    """Float32 values of a constant that a DequantizeLinear reads: per tensor, channel or block."""
    parts = [None if v is None else constant(v) for v in node.inputs]
    integers, scale = parts[0], parts[1]
    if integers is None or scale is None:
        return None
    values = integers.astype(np.float32)
    zero = parts[2].astype(np.float32) if len(parts) > 2 and parts[2] is not None else np.zeros((), np.float32)
    axis = int(attribute(node, "axis", 1)) % max(values.ndim, 1)
    block = int(attribute(node, "block_size", 0))

    def spread(array: Array) -> Array:
        if not array.ndim or array.size == 1:
            return array.reshape(())
        if block:
            return np.repeat(array, block, axis=axis)[tuple(map(slice, values.shape))]
        shape = [1] * values.ndim
        shape[axis] = -1
        return array.reshape(shape)

    return np.asarray((values - spread(zero)) * spread(scale.astype(np.float32)), np.float32)


def _from_blocks(node: ir.Node) -> Array | None:
    codes, scale = constant(node.inputs[1]), constant(node.inputs[2])
    zero = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if codes is None or scale is None:
        return None
    bits, size = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 32))
    rows, columns = int(attribute(node, "N")), int(attribute(node, "K"))
    count = -(-columns // size)
    if zero is not None:
        zero = unpack(zero.reshape(rows, -1), bits)[:, :count] if zero.dtype == np.uint8 else zero.reshape(rows, count)
    blocks = Blocks(
        bits=bits, block_size=size, columns=columns, codes=codes.reshape(rows, count, -1),
        scale=scale.reshape(rows, count), zero_point=zero, error=0.0,
    )  # fmt: skip
    return blocks.dequantize().T
