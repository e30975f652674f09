"""Places behind which every channel of an activation can be scaled, and maybe shifted, for free.

An activation `x` that linear layers read becomes `(x - shift) / scale`, one value a channel. Its source takes
`1 / scale` and `-shift`, the layers take `scale` into the rows of their weights and `shift @ weight` into their biases,
so that their outputs stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, in_main_graph, redirect, users
from onnxcomp.passes._bias import Bias, find_bias
from onnxcomp.passes._projections import Projection, arriving_channels, find_projection, read_once
from onnxcomp.rewrite import Context
from onnxcomp.target import Array

# Ops that a positive scale passes: f(x / s) = f(x) / s.
_THROUGH = frozenset({"Relu", "LeakyRelu", "Mul"})

# Op type to the inputs that hold gamma and beta; None where there is no beta.
_NORMS: dict[tuple[str, str], tuple[int, int | None]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1, None),
    ("", "SimplifiedLayerNormalization"): (1, None),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1, None),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2, None),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What puts out an activation and takes a scale, and maybe a shift.

    Attributes:
        place: For the report.
        shifts: It takes a shift as well.
        divide: Makes the activation `(x - shift) / scale`, both float32 `(channels,)`.
        groups: For each channel, the number of its group, where channels have to share their scale and shift.
        costs: It adds a pass over the tensor.
    """

    place: str
    shifts: bool
    divide: Callable[[Editor, Array, Array], None]
    groups: Array | None = None
    costs: bool = False


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A MatMul or Gemm of the main graph with a float32 weight that nobody else reads.

    Attributes:
        node: The op.
        bias: Its constant bias, or None.
    """

    node: ir.Node
    bias: Bias | None

    @property
    def matrix(self) -> Array:
        """Weight as `(inputs, outputs)`."""
        weight = constant(self.node.inputs[1])
        assert weight is not None
        return weight.T if self._transposed else weight

    @property
    def _transposed(self) -> bool:
        return bool(self.node.op_type == "Gemm" and attribute(self.node, "transB", 0))

    def scale_inputs(self, editor: Editor, scale: Array, shift: Array) -> None:
        """Undoes `(x - shift) / scale` of the input."""
        moved = shift @ self.matrix
        self._set(editor, self.matrix * scale[:, None])
        if shift.any():
            self._set_bias(editor, lambda b: b + moved)

    def take_apart(self, editor: Editor, value: ir.Value, channels: Array) -> None:
        """Adds, in float, what `channels` of its input contribute; the op itself loses their rows to `scale_inputs`."""
        assert self.bias is not None
        name, end = f"{self.node.name}_apart", self.bias.user.outputs[0]
        readers = users(end)
        inputs = [value, editor.weight(f"{name}_channels", channels)]
        picked = editor.after(value, "Gather", inputs, name=f"{name}_input", attributes={"axis": -1})
        rows = editor.weight(f"{name}_rows", np.ascontiguousarray(self.matrix[channels]))
        # Not a MatMul, which would be quantized.
        product = {"equation": "...k,kn->...n"}
        product_of = editor.after(picked, "Einsum", [picked, rows], name=name, attributes=product, like=end)
        total = editor.after(end, "Add", [end, product_of], name=f"{name}_sum", like=end)
        redirect(end, total, readers)
        editor.rename(self.node.outputs[0], "smooth")
        editor.rename(end, "smooth")

    def scale_outputs(self, editor: Editor, scale: Array, shift: Array) -> None:
        """Makes the output, bias included, `(y - shift) / scale`."""
        self._set(editor, self.matrix / scale)
        if self.bias is not None:
            self._set_bias(editor, lambda b: (b - shift) / scale)

    def _set(self, editor: Editor, matrix: Array) -> None:
        old = self.node.inputs[1]
        assert old is not None
        matrix = np.ascontiguousarray(matrix.T if self._transposed else matrix, np.float32)
        self.node.replace_input_with(1, editor.weight(f"{(old.name or 'w').removesuffix('_smooth')}_smooth", matrix))

    def _set_bias(self, editor: Editor, change: Callable[[Array], Array]) -> None:
        bias = find_bias(self.node)
        assert bias is not None
        _replace_constant(editor, bias.user, bias.value, change)
        if bias.user is not self.node:  # what stands between the op and its bias is no longer what it was
            editor.rename(self.node.outputs[0], "smooth")


def find_linear(model: ir.Model, node: ir.Node) -> Linear | str:
    """A linear layer whose parameters may be changed, or the reason why not."""
    if not in_main_graph(model, node):
        return "it stands in a subgraph or function, whose values calibration cannot observe"
    weight = node.inputs[1]
    array = constant(weight)
    if weight is None or array is None:
        producer = weight.producer() if weight is not None else None
        quantized = producer is not None and producer.op_type == "DequantizeLinear"
        return "it is quantized already; scales go into float weights" if quantized else "its weight is not constant"
    if array.dtype != np.float32:
        return f"its weight is {array.dtype}, not float32"
    if array.ndim != 2:
        return f"its weight has {array.ndim} dimensions, not 2"
    if not np.isfinite(array).all():
        return "its weight holds NaN or infinity"
    if len(weight.uses()) > 1:
        return "its weight is shared with another op"
    if node.op_type == "Gemm" and any(
        attribute(node, key, usual) != usual for key, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
    ):
        return "it is a Gemm with alpha, beta or transA"
    linear = Linear(node=node, bias=None)
    bias = find_bias(node)
    vector = constant(bias.value) if bias is not None else None
    outputs = linear.matrix.shape[1]
    if bias is None or (vector is not None and vector.dtype == np.float32 and vector.size == outputs):
        return Linear(node=node, bias=bias)
    return linear if node.op_type == "MatMul" else "its bias is not a constant float32 vector of one value a channel"


def direct_source(value: ir.Value, channels: int) -> Source | str:
    """The norm, or the Mul and Add by constants, that puts out `value`; or why there is none."""
    node = value.producer()
    if node is None:
        return "its input is an input of the graph"
    inputs = _NORMS.get((node.domain.removeprefix("ai.onnx"), node.op_type))
    if inputs is not None:
        gamma, beta = inputs
        parameters = [node.inputs[i] for i in inputs if i is not None and i < len(node.inputs)]
        arrays = [constant(v) for v in parameters if v is not None]
        if any(a is None or a.shape != (channels,) or a.dtype != np.float32 for a in arrays) or not arrays:
            return f"the {node.op_type} before it has no constant float32 vector as gamma or beta"
        return _norm_source(node, gamma, beta)
    add = node if node.op_type == "Add" and _constant_operand(node, channels) is not None else None
    mul = node
    if add is not None:
        data = next(v for v in add.inputs if v is not _constant_operand(add, channels))
        if data is None or data.producer() is None or not read_once(data):
            return "its input is a sum of which only a constant is known"
        mul = data.producer() or add
    if mul.op_type == "Mul" and mul.domain == "" and _constant_operand(mul, channels) is not None:
        return _affine_source(mul, add, channels)
    return f"its input comes from {node.op_type}, through which a scale does not pass for free"


def find_layer(model: ir.Model, value: ir.Value) -> tuple[Projection, Linear] | None:
    """The layer whose output channels arrive at `value`, as far as the graph alone tells."""
    projection = find_projection(value, _THROUGH)
    producer = projection.projected.producer() if projection is not None else None
    if projection is None or producer is None:
        return None
    if producer.op_type == "Add":
        producer = next(n for v in producer.inputs if v is not None and (n := v.producer()) is not None)
        linear = find_linear(model, producer)
        if not isinstance(linear, str) and linear.bias is None:
            return None  # the bias is there, but of another kind
    else:
        linear = find_linear(model, producer)
    return None if isinstance(linear, str) else (projection, linear)


def layer_sources(
    model: ir.Model,
    context: Context,
    found: Mapping[ir.Value, tuple[Projection, Linear]],
    channels: Mapping[ir.Value, int],
) -> dict[ir.Value, Source]:
    """Activation to its layer, where runs of the model prove which output channel arrives at which channel."""
    numbers = arriving_channels(model, context, [projection for projection, _ in found.values()])
    return {
        value: _layer_source(linear, projection, arrived)
        for (value, (projection, linear)), arrived in zip(found.items(), numbers, strict=True)
        if arrived is not None and len(arrived) == channels[value]
    }


def unsuitable_reader(value: ir.Value, readers: list[ir.Node]) -> str | None:
    """Why `value` cannot be changed, since something besides `readers` sees it; None if nothing does."""
    if value.is_graph_output():
        return "its input is an output of the graph"
    other = next((n for n in users(value) if n not in readers and n.op_type != "Shape"), None)
    return None if other is None else f"its input is read by {other.op_type} {other.name!r} too, which cannot undo it"


def explicit_source(value: ir.Value, readers: Sequence[ir.Node]) -> Source:
    """A Mul in front of the layers, which costs a pass over the tensor."""

    def divide(editor: Editor, scale: Array, shift: Array) -> None:
        name = f"{value.name}_smooth"
        factor = editor.weight(f"{name}_factor", (1.0 / scale).astype(np.float32))
        redirect(value, editor.after(value, "Mul", [value, factor], name=name, like=value), readers)

    return Source(place="explicit Mul", shifts=False, divide=divide, costs=True)


def _norm_source(node: ir.Node, gamma: int, beta: int | None) -> Source:
    def divide(editor: Editor, scale: Array, shift: Array) -> None:
        _replace_constant(editor, node, node.inputs[gamma], lambda g: g / scale)
        given = node.inputs[beta] if beta is not None and beta < len(node.inputs) else None
        if given is not None:
            _replace_constant(editor, node, given, lambda b: (b - shift) / scale)
        elif beta is not None and shift.any():
            node.resize_inputs(max(len(node.inputs), beta + 1))
            node.replace_input_with(beta, editor.weight(f"{node.name}_beta", (-shift / scale).astype(np.float32)))
        editor.rename(node.outputs[0], "smooth")

    return Source(place=f"{node.op_type} gamma", shifts=beta is not None, divide=divide)


def _affine_source(mul: ir.Node, add: ir.Node | None, channels: int) -> Source:
    """A Mul by a constant, with an Add of a constant behind it or none: what older exports leave of a norm."""

    def divide(editor: Editor, scale: Array, shift: Array) -> None:
        _replace_constant(editor, mul, _constant_operand(mul, channels), lambda g: g / scale)
        if add is not None:
            _replace_constant(editor, add, _constant_operand(add, channels), lambda b: (b - shift) / scale)
            editor.rename(add.outputs[0], "smooth")
        editor.rename(mul.outputs[0], "smooth")

    return Source(place="constant of a Mul", shifts=add is not None, divide=divide)


def _layer_source(linear: Linear, projection: Projection, channels: Array) -> Source:
    def divide(editor: Editor, scale: Array, shift: Array) -> None:
        everywhere, moved = np.ones(projection.size), np.zeros(projection.size)
        everywhere[channels], moved[channels] = scale, shift
        linear.scale_outputs(editor, everywhere, moved)
        for value in projection.path:
            editor.rename(value, "smooth")

    # Attention weights of a query sum to one, so a constant passes them unchanged.
    shifts = projection.attention and linear.bias is not None
    groups = None if len(set(channels.tolist())) == len(channels) else channels
    return Source(place=f"columns of {linear.node.name}", shifts=shifts, divide=divide, groups=groups)


def _constant_operand(node: ir.Node, channels: int) -> ir.Value | None:
    """The float32 operand of a Mul or Add that holds one constant a channel of the last axis."""
    for value in node.inputs:
        array = constant(value)
        if array is not None and array.dtype == np.float32 and array.shape[-1:] == (channels,) == (array.size,):
            return value
    return None


def _replace_constant(editor: Editor, node: ir.Node, value: ir.Value | None, change: Callable[[Array], Array]) -> None:
    """Makes `node` read a changed copy of a constant vector, whatever its shape."""
    array = constant(value)
    assert value is not None
    assert array is not None
    changed = change(array.reshape(-1).astype(np.float64)).reshape(array.shape)
    new = editor.weight(f"{(value.name or 'constant').removesuffix('_smooth')}_smooth", changed.astype(np.float32))
    redirect(value, new, [node])
