"""What the structure of a graph tells of the model: its layers, attention, masks, caches, states, tokens.

Only ops, shapes of weights, and where inputs and outputs lead are looked at. Names play no part, so that it does not
matter who exported the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, users
from onnxcomp.model import all_nodes

_CONVS = frozenset({"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "NhwcFusedConv"})
_LINEARS = frozenset({
    "MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm",
    "MatMulNBits", "FusedMatMul", "FusedGemm", "Einsum",
})  # fmt: skip
_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
_CAUSAL = frozenset({
    "GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "SparseAttention",
    "PagedAttention",
})  # fmt: skip
_ATTENTION = _CAUSAL | {
    "Attention", "MultiHeadAttention", "QAttention", "PackedAttention", "PackedMultiHeadAttention",
    "LongformerAttention", "QOrderedAttention",
}  # fmt: skip
_GENERATING = frozenset({"BeamSearch", "GreedySearch", "Sampling"})
_COMPARING = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_WRITING = frozenset({"Concat", "ScatterND", "ScatterElements", "TensorScatter"})
_SECOND_OPERAND = {"QLinearMatMul": 3, "QGemm": 3, "QLinearConv": 3}

_STORING = frozenset({
    "Cast", "Concat", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Slice", "Split",
    "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Ops that may stand between a constant and the layer whose weight it is."""
_MOVING = _STORING | {"Dropout", "Expand", "Gather"}
_SCORING = _MOVING | {"Add", "Sub", "Mul", "Div", "Where", "Clip", "Max", "Min"}
"""Ops that may stand between a product and the softmax."""
_HEAD = _SCORING | {"Softmax", "LogSoftmax", "Tanh", "ArgMax"}
"""Ops that may stand between the last product and the output."""
_COUNTING = _SCORING | {"CumSum", "Equal", "Not", "And"}
"""Ops that may stand between an input or Range and positions or indices."""

_HOPS = 24
_VOCABULARY = 4096
"""Least size of an output that is taken for a vocabulary where no table of tokens tells it."""
_FEWEST_TOKENS = 32
"""Smaller tables hold categories, such as the two sentences of BERT."""
_LEAST_MASK = 8
"""Smallest size of a square mask."""


@dataclass(kw_only=True)
class Layers:
    """Nodes of one sort that have constant weights, and the number of these."""

    nodes: int = 0
    weights: int = 0


class Structure:
    """A model without functions, looked at from several sides.

    Attributes:
        convs: Convolutions.
        linears: Products with a constant matrix.
        recurrent: LSTM, GRU, RNN, and products in the body of a loop.
    """

    def __init__(self, model: ir.Model) -> None:
        self.convs, self.linears, self.recurrent = Layers(), Layers(), Layers()
        self._outputs = model.graph.outputs
        self._floats = [v for v in model.graph.inputs if not v.is_initializer() and _is_float(v)]
        self._nodes = list(all_nodes(model))
        looping = {inner for node in self._nodes if node.op_type in ("Loop", "Scan") for inner in _bodies(node)}
        counted: set[ir.Value] = set()
        for node in self._nodes:
            layers = self._layers(node, node in looping)
            if layers is None:
                continue
            stored = {value for i in _operands(node) for value in _stored(_input(node, i))}
            layers.nodes += bool(stored)
            layers.weights += sum(_tensor(value).size for value in stored - counted)
            counted |= stored

    def _layers(self, node: ir.Node, looping: bool) -> Layers | None:
        linear = node.op_type in _LINEARS or node.op_type in _ATTENTION
        if node.op_type in _RECURRENT or (looping and linear):
            return self.recurrent
        if node.op_type in _CONVS:
            return self.convs
        return self.linears if linear else None

    def attention(self) -> int:
        """Number of attention blocks: fused ops, and softmaxes between two products of activations."""
        return sum(node.op_type in _ATTENTION or _is_attention(node) for node in self._nodes)

    def causal(self) -> str:
        """What hides the tokens to come; empty if nothing does."""
        for node in self._nodes:
            if node.op_type in _CAUSAL or node.op_type in _GENERATING:
                return f"causal by {node.op_type}"
            if attribute(node, "is_causal", 0) or attribute(node, "unidirectional", 0):
                return f"causal by an attribute of {node.op_type}"
            if node.op_type == "Trilu":
                return "causal mask (Trilu)"
            if node.op_type in _COMPARING and all(_counts(value) for value in node.inputs):
                return f"causal mask ({node.op_type} of positions)"
        masks = dict.fromkeys(v for n in self._nodes if n.op_type in _COUNTING for v in n.inputs if v is not None)
        return "causal mask (constant triangle)" if any(map(_is_triangle, masks)) else ""

    def caches(self) -> int:
        """Number of inputs that come out again with something appended or written in, as keys and values do."""
        found = 0
        for value in self._floats:
            if value.shape is None or len(value.shape) >= 3:
                readers = users(value)
                found += any(n.op_type in _ATTENTION or (n.op_type in _WRITING and _leaves(n)) for n in readers)
        return found

    def states(self) -> int:
        """Number of inputs that recurrent layers or loops start from and that have an output of the same shape."""
        initial = [value for node in self._nodes for value in _initial_states(node)]
        inputs = {source for value in initial for source in _sources(value, _MOVING) if source in self._floats}
        return (Counter(map(_form, inputs)) & Counter(map(_form, self._outputs))).total()

    def token_tables(self) -> dict[str, int]:
        """Names of integer inputs that look up rows of constant tables, with the number of rows; largest first."""
        found: dict[str, int] = {}
        for node in self._nodes:
            if node.op_type in ("Gather", "GatherBlockQuantized") and attribute(node, "axis", 0) == 0:
                table, indices = _input(node, 0), _input(node, 1)
            elif node.op_type in ("EmbedLayerNormalization", "QEmbedLayerNormalization"):
                table, indices = _input(node, 2), _input(node, 0)
            else:
                continue
            shape = _stored_shape(table)
            if len(shape) < 2 or shape[0] < _FEWEST_TOKENS or shape[1] < 2:
                continue
            for value in _sources(indices, _COUNTING):
                if value.dtype in (ir.DataType.INT64, ir.DataType.INT32):
                    found[value.name or ""] = max(found.get(value.name or "", 0), shape[0])
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def logits_over(self, rows: int | None) -> str:
        """What shows that an output scores `rows` tokens, or any large vocabulary for None; empty if none does."""
        for output in self._outputs:
            last = output.shape[-1] if output.shape is not None and len(output.shape) else None
            columns = (_columns(node) for node in _producers(output, _HEAD) if node.op_type in _LINEARS)
            for size in (last, *columns):
                if isinstance(size, int) and (size >= _VOCABULARY if rows is None else size == rows):
                    return f"{output.name} scores {size} tokens"
        return ""


def _operands(node: ir.Node) -> Iterable[int]:
    """Indices of the inputs that may be weights of a layer."""
    if node.op_type in _SECOND_OPERAND:
        return (_SECOND_OPERAND[node.op_type],)
    return (1, 2) if node.op_type in _RECURRENT else (0, 1)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _stored(value: ir.Value | None, hops: int = _HOPS) -> list[ir.Value]:
    """The constants behind a weight, moved, joined and dequantized at most; none for an activation."""
    if value is None or not hops:
        return []
    if ir.convenience.get_const_tensor(value) is not None:
        return [value]
    producer = value.producer()
    if producer is None or producer.op_type not in _STORING:
        return []
    if producer.op_type != "Concat":
        return _stored(_input(producer, 0), hops - 1)
    parts = [_stored(v, hops - 1) for v in producer.inputs]
    return [v for part in parts for v in part] if all(parts) else []


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor


def _stored_shape(value: ir.Value | None) -> tuple[int, ...]:
    """Shape of the constant behind a weight as it is stored; empty for an activation."""
    found = _stored(value)
    return tuple(_tensor(found[0]).shape.numpy()) if found else ()


def _columns(node: ir.Node) -> int | None:
    """Number of outputs of a matrix product with a constant weight."""
    if node.op_type == "MatMulNBits":
        return int(attribute(node, "N", 0))
    value = _input(node, _SECOND_OPERAND.get(node.op_type, 1))
    shape, turned = _stored_shape(value), bool(attribute(node, "transB", 0))
    if len(shape) != 2:
        return None
    while value is not None and (producer := value.producer()) is not None and producer.op_type in _STORING:
        turned ^= producer.op_type == "Transpose"
        value = _input(producer, 0)
    return shape[0 if turned else 1]


def _producers(value: ir.Value | None, through: frozenset[str]) -> Iterator[ir.Node]:
    """Nodes upstream of `value`, nearest first, up to and with the first ones that are not of the types `through`."""
    seen: set[ir.Node] = set()
    front = [value]
    for _ in range(_HOPS):
        nodes = dict.fromkeys(n for v in front if v is not None and (n := v.producer()) is not None and n not in seen)
        seen.update(nodes)
        yield from nodes
        front = [v for n in nodes if n.op_type in through for v in n.inputs]


def _readers(value: ir.Value, through: frozenset[str]) -> Iterator[ir.Node]:
    """Nodes downstream of `value`, nearest first, down to and with the first ones that are not of those types."""
    seen: set[ir.Node] = set()
    front = [value]
    for _ in range(_HOPS):
        nodes = dict.fromkeys(n for v in front for n in users(v) if n not in seen)
        seen.update(nodes)
        yield from nodes
        front = [v for n in nodes if n.op_type in through for v in n.outputs]


def _sources(value: ir.Value | None, through: frozenset[str]) -> set[ir.Value]:
    """Graph inputs that `value` is, or is computed from by the op types `through`."""
    values = [value, *(v for n in _producers(value, through) if n.op_type in through for v in n.inputs)]
    return {v for v in values if v is not None and v.is_graph_input() and not v.is_initializer()}


def _leaves(node: ir.Node) -> bool:
    """Whether what the node puts out is an output of the model, moved at most."""
    values = [*node.outputs]
    for value in node.outputs:
        values += [v for n in _readers(value, _MOVING) if n.op_type in _MOVING for v in n.outputs]
    return any(v.is_graph_output() for v in values)


def _is_attention(node: ir.Node) -> bool:
    """Whether a softmax stands between two products of activations."""
    return (
        node.op_type == "Softmax"
        and _any(_producers(_input(node, 0), _SCORING), _multiplies_activations)
        and _any(_readers(node.outputs[0], _SCORING), _multiplies_activations)
    )


def _multiplies_activations(node: ir.Node) -> bool:
    return node.op_type in _LINEARS and not any(_stored(_input(node, i)) for i in _operands(node))


def _counts(value: ir.Value | None) -> bool:
    """Whether a value is made of a Range, as positions are."""
    return _any(_producers(value, _COUNTING), lambda node: node.op_type == "Range")


def _any(nodes: Iterable[ir.Node], wanted: Callable[[ir.Node], bool]) -> bool:
    return any(wanted(node) for node in nodes)


def _is_triangle(value: ir.Value) -> bool:
    """Whether a constant is a square mask whose upper triangle differs from the rest, as GPT-2 stores it."""
    tensor = ir.convenience.get_const_tensor(value)
    shape = () if tensor is None else tuple(tensor.shape.numpy())
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < _LEAST_MASK or np.prod(shape[:-2]) != 1:
        return False
    array = constant(value)
    if array is None:
        return False
    corner = array.reshape(shape[-2:])[:64, :64]
    upper, lower = corner[np.triu_indices(len(corner), 1)], corner[np.tril_indices(len(corner))]
    return bool((upper == upper[0]).all() and (lower == lower[0]).all() and upper[0] != lower[0])


def _initial_states(node: ir.Node) -> list[ir.Value | None]:
    """Inputs of a recurrent node or loop that hold its state before the first step."""
    if node.op_type in _RECURRENT:
        return list(node.inputs[5:7])
    return list(node.inputs[2:] if node.op_type == "Loop" else node.inputs if node.op_type == "Scan" else ())


def _form(value: ir.Value) -> tuple[int | None, ...]:
    """Sizes of a value, None for those that are open."""
    return () if value.shape is None else tuple(d if isinstance(d, int) and d > 0 else None for d in value.shape)


def _bodies(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes of the subgraphs of a node."""
    for given in node.attributes.values():
        if given.type == ir.AttributeType.GRAPH:
            yield from given.as_graph().all_nodes()
