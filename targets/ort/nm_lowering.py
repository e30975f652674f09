"""Swaps calls of N:M products for the native kernels, or for dense products where those are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp import native
from onnxcomp.break_even import BreakEven, Product
from onnxcomp.edit import Editor, attribute, become, constant, users
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.target import Array
from onnxcomp.targets.ort.dense_forms import int8_blocks, later
from onnxcomp.targets.ort.lowering import LOWERED, fixed_rows
from onnxcomp.targets.ort.nm_calls import NmCall, drop_uncalled, is_nm_call, nm_call
from onnxcomp.targets.ort.trials import DENSE_BLOCK, MICROSOFT, NM_COLUMNS, NM_QUAD

_GROUP = 4  # inputs that a slot of a kernel selects from


@dataclass(frozen=True, kw_only=True)
class NativeNm(Pass):
    """Makes N:M products of the portable ops native ones, where a kernel takes them and was measured to be faster.

    All others become dense products with the weight unpacked: 8-bit integers as `MatMulNBits`, which rounds activations
    as the kernels do, floats as `MatMul`. The Add of a constant behind a native product goes into it.
    """

    name: ClassVar[str] = "native_nm"
    summary: ClassVar[str] = "N:M products to native kernels."

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits = []
        lowered: dict[tuple[object, ...], list[ir.Value]] = {}
        for node in list(model.graph.all_nodes()):
            if not is_nm_call(node):
                continue
            call = _call(node)
            if isinstance(call, str):
                edits.append(refused(node, call))
                continue
            reason = _why_dense(call, context.capabilities.break_even)
            key = (*call.parts, bool(reason))
            if key not in lowered:
                lowered[key] = _dense_weights(model, call) if reason else _blocks(model, call)
            if reason:
                _to_dense(model, call, lowered[key])
                node.metadata_props[LOWERED] = reason
                edits.append(applied(node, f"runs as a dense product: {reason}"))
            else:
                _to_native(model, call, lowered[key])
                edits.append(applied(node, f"runs in the native library, {call.kept} of 4 weights stored"))
        drop_uncalled(model)
        return edits


def _call(node: ir.Node) -> NmCall | str:
    """What a kernel could compute, or why a node has to run by the body of its function."""
    if attribute(node, "exact", 0):
        return "it is exact, and kernels round activations to 8 bits; it runs by its function body"
    if node.inputs[0] is None or node.inputs[0].dtype not in (ir.DataType.FLOAT, None):
        return "the kernels take float activations; it runs by its function body"
    return nm_call(node)


def _why_dense(call: NmCall, table: Sequence[BreakEven]) -> str:
    """Why a dense product is better; empty if it is not."""
    if not native.available():
        return "onnxcomp was installed without its native library"
    if call.kept is None:
        return f"there are kernels for 1:4, 2:4 and what keeps to these, not for {call.pattern}"
    rows = fixed_rows(call.node)
    product = Product(op="nm_matmul", weights="int8" if call.int8 else "fp32", inputs=call.k, outputs=call.n)
    needed = product.break_even(table, rows)
    zeros = 1 - call.kept / _GROUP
    if needed is None or zeros >= needed:
        return ""
    wanted = "no pattern" if needed > 1 - 1 / _GROUP else "1:4"
    return (
        f"its {call.kept}:4 kernel is slower than the dense product, and so it takes {wanted} for one that is not "
        f"({rows} row{'s' * (rows > 1)}, {call.k}x{call.n} {product.weights})"
    )


def _dense_weights(model: ir.Model, call: NmCall) -> list[ir.Value]:
    editor, name = Editor(model), call.parts[0].name or "weight"
    if not call.int8:
        return [
            later(
                editor, f"{name}_dense", lambda: call.weight().astype(np.float32), ir.DataType.FLOAT, (call.k, call.n)
            )
        ]
    blocks = -(-call.k // DENSE_BLOCK)

    def stored() -> tuple[Array, Array]:
        scale = constant(call.parts[2])
        assert scale is not None
        return int8_blocks(call.weight().T, scale)

    return [
        later(editor, f"{name}_blocks", lambda: stored()[0], ir.DataType.UINT8, (call.n, blocks, DENSE_BLOCK)),
        later(editor, f"{name}_scales", lambda: stored()[1], ir.DataType.FLOAT, (call.n, blocks)),
    ]


def _to_dense(model: ir.Model, call: NmCall, weights: Sequence[ir.Value]) -> None:
    inputs = [call.node.inputs[0], *weights]
    if not call.int8:
        become(call.node, "MatMul", inputs, {}, "")
        return
    attributes = {"K": call.k, "N": call.n, "bits": 8, "block_size": DENSE_BLOCK, "accuracy_level": 4}
    become(call.node, "MatMulNBits", inputs, attributes, MICROSOFT)
    model.opset_imports.setdefault(MICROSOFT, 1)


def _blocks(model: ir.Model, call: NmCall) -> list[ir.Value]:
    """Values and places as the kernels take them, computed when they are read."""
    editor, name, kept = Editor(model), call.parts[0].name or "weight", call.kept
    assert kept is not None
    dtype = call.parts[0].dtype
    assert dtype is not None
    shape = (-(-call.n // NM_COLUMNS), -(-call.k * kept // (_GROUP * NM_QUAD)))

    def stored(index: int) -> Callable[[], Array]:
        return lambda: nm_blocks(call.weight(), kept)[index]

    return [
        later(editor, f"{name}_blocked", stored(0), dtype, (*shape, NM_COLUMNS * NM_QUAD)),
        later(editor, f"{name}_places", stored(1), ir.DataType.UINT8, (*shape, NM_COLUMNS)),
    ]


def _to_native(model: ir.Model, call: NmCall, weights: Sequence[ir.Value]) -> None:
    node, kept = call.node, call.kept
    assert kept is not None
    editor = Editor(model)
    bias = _bias_behind(node, call.n)
    added = None if bias is None else constant(bias[1])
    array = np.zeros(call.n, np.float32) if added is None else added.reshape(-1).astype(np.float32)
    name = f"{node.name or call.parts[0].name}_bias"
    inputs = [node.inputs[0], *weights, editor.weight(name, array), *call.parts[2:]]
    become(node, node.op_type, inputs, {"kept": kept}, native.DOMAIN)
    model.opset_imports.setdefault(native.DOMAIN, 1)
    if bias is not None:
        add, graph = bias[0], bias[0].graph
        assert isinstance(graph, ir.Graph)
        output, old = node.outputs[0], add.outputs[0]
        output.shape, output.type = old.shape, old.type
        output.name, old.name = old.name, None
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        graph.remove(add, safe=True)


def _bias_behind(node: ir.Node, columns: int) -> tuple[ir.Node, ir.Value] | None:
    """The Add of one constant a column to what a node puts out, and the constant."""
    output = node.outputs[0]
    readers = users(output)
    if output.is_graph_output() or len(readers) != 1 or len(output.uses()) != 1:
        return None
    add = readers[0]
    if add.op_type != "Add" or add.domain or add.graph is not node.graph:
        return None
    other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    array = None if other is None else constant(other)
    if other is None or array is None or array.dtype != np.float32 or array.size != columns:
        return None
    rank = None if output.shape is None else len(output.shape)
    return (add, other) if array.shape[-1:] == (columns,) and (array.ndim == 1 or rank == array.ndim) else None


def nm_blocks(weight: Array, kept: int) -> tuple[Array, Array]:
    """A weight in the blocks of columns that the kernels take.

    Args:
        weight: (K, N), of every four consecutive rows of a column at most `kept` not zero.
        kept: 1 or 2.

    Returns:
        Values, (blocks, quads, 64): for each four slots of a column floats by slot and then column, integers the other
        way round. And the rows within their groups, two bits each, uint8 (blocks, quads, 16).
    """
    rows, columns = weight.shape
    quad_rows = _GROUP * NM_QUAD // kept
    padded = np.pad(weight, [(0, -rows % quad_rows), (0, -columns % NM_COLUMNS)])
    grouped = padded.reshape(-1, _GROUP, padded.shape[1])
    nonzero = grouped != 0
    places = nonzero.argmax(axis=1)[:, None]
    if kept == 2:
        last = _GROUP - 1 - nonzero[:, ::-1].argmax(axis=1)[:, None]
        places = np.concatenate([places, last], axis=1)
    values = np.take_along_axis(grouped, places, axis=1)
    if kept == 2:
        values[:, 1][places[:, 1] == places[:, 0]] = 0  # where a group has one weight
        values[:, 1][~nonzero.any(axis=1)] = 0
    blocks = padded.shape[1] // NM_COLUMNS
    by_quad = values.reshape(-1, NM_QUAD, blocks, NM_COLUMNS)
    order = (2, 0, 3, 1) if weight.dtype == np.int8 else (2, 0, 1, 3)
    blocked = np.ascontiguousarray(by_quad.transpose(order)).reshape(blocks, -1, NM_QUAD * NM_COLUMNS)
    bits = places.astype(np.uint8).reshape(-1, NM_QUAD, blocks, NM_COLUMNS)
    packed = bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6
    return blocked, np.ascontiguousarray(packed.swapaxes(0, 1))
