"""Swaps calls of portable ops for the kernels of the native library, or for dense products where those are faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.break_even import BreakEven
from onnxcomp.edit import Editor, attribute
from onnxcomp.ops import DOMAIN, OPS, SPARSITY
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.targets.ort.dense_forms import SparseCall, drop_unused, sparse_call, to_dense

LOWERED = "onnxcomp.lowered"
"""Metadata of a node that was a sparse op and is computed by another, with the reason."""

# Where the kernel reads the weight of an input by columns, it wants it turned, so that a column is one run of memory.
_TURNED = {"GatedMLP": 2, "GatedMLPInt8": 2}


@dataclass(frozen=True, kw_only=True)
class NativeOps(Pass):
    """Makes calls of portable ops native ones, in the main graph and in subgraphs, where the kernels take their types.

    A call whose inputs are dropped too seldom to pay becomes a dense product, by the break-even that was measured for
    the target. So does one of several rows where their number is fixed; where it is not, the target decides at run
    time. A call that stays as it is runs by the body of its function.
    """

    name: ClassVar[str] = "native_ops"
    summary: ClassVar[str] = "Portable ops to native kernels."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        turned: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph.all_nodes()):
            if node.domain != DOMAIN or node.op_type not in OPS:
                continue
            if reason := _why_not(node):
                edits.append(refused(node, reason))
                continue
            call = sparse_call(node)
            if call is not None and (reason := why_dense(call, context.capabilities.break_even, fixed_rows(node))):
                to_dense(model, call)
                node.metadata_props[LOWERED] = reason
                edits.append(applied(node, f"runs as a dense product: {reason}"))
                continue
            if (index := _TURNED.get(node.op_type)) is not None:
                weight = node.inputs[index]
                assert weight is not None
                if weight not in turned:
                    turned[weight] = _turn(model, weight)
                node.replace_input_with(index, turned[weight])
            node.domain = native.DOMAIN
            model.opset_imports.setdefault(native.DOMAIN, 1)
            edits.append(applied(node, "runs in the native library"))
        _tidy(model)
        return edits


def why_dense(call: SparseCall, table: Sequence[BreakEven], rows: int | None, *, beyond: int = 1) -> str:
    """Why a sparse op is better computed by a dense product; empty if it is not, or nothing is known of its sparsity.

    Args:
        call: The op.
        table: When sparse kernels pay.
        rows: Rows of activations; None for any number beyond some.
        beyond: That number.
    """
    noted = call.node.metadata_props.get(SPARSITY)
    try:
        sparsity = float(noted) if noted is not None else math.nan
    except ValueError:
        sparsity = math.nan
    # An exact op multiplies floats, which was not measured, and which the dense products do not do.
    if math.isnan(sparsity) or attribute(call.node, "exact", 0):
        return ""
    product = call.product
    needed = product.worst_break_even(table, beyond) if rows is None else product.break_even(table, rows)
    if needed is None or sparsity >= needed:
        return ""
    what = "neurons" if product.op == "gated_mlp" else "inputs"
    number = beyond if rows is None else rows
    count = f"{'more than ' * (rows is None)}{number} row{'s' * (number > 1)}"
    return (
        f"{sparsity:.0%} of its {what} are dropped, and the sparse kernel is faster from {needed:.0%} on "
        f"({count}, {call.inputs}x{call.outputs} {product.weights})"
    )


def fixed_rows(node: ir.Node) -> int:
    """Rows of a sparse op's activations; one where that is not known before it runs."""
    first = node.inputs[0]
    if first is None or first.shape is None:
        return 1
    known = [size for size in list(first.shape)[:-1] if isinstance(size, int)]
    return math.prod(known) if len(known) == len(first.shape) - 1 else 1


def _tidy(model: ir.Model) -> None:
    """Takes weights and functions away that nothing uses any more."""
    drop_unused(model)
    called = {n.op_identifier() for n in model.graph.all_nodes()}
    called |= {n.op_identifier() for f in model.functions.values() for n in f.all_nodes()}
    for key in [k for k in model.functions if k[0] == DOMAIN and k[1] in OPS and k not in called]:
        del model.functions[key]


def _why_not(node: ir.Node) -> str:
    if not native.available():
        return "onnxcomp was installed without its native library"
    kind = _activation_type(node)
    if kind != "float":
        return f"the kernels take float activations, these are {kind}; the op runs by its function body"
    index = _TURNED.get(node.op_type)
    if index is not None:
        weight = node.inputs[index]
        if weight is None or weight.const_value is None or not weight.is_initializer() or weight.is_graph_input():
            return "the up projection is not a constant; the op runs by its function body"
    return ""


def _activation_type(node: ir.Node) -> str:
    """Type of the activations, which thresholds and float weights share, where that of the first input is not noted."""
    thresholded = not node.op_type.startswith("TopK")
    for value in (node.inputs[0], node.inputs[-1] if thresholded else node.inputs[1]):
        if value is not None and value.dtype is not None and value.dtype.is_floating_point():
            return value.dtype.name.lower()
    scale = node.inputs[2] if len(node.inputs) > 2 else None
    return "unknown" if scale is None or scale.dtype is None else scale.dtype.name.lower()


def _turn(model: ir.Model, weight: ir.Value) -> ir.Value:
    """The transposed weight, a new initializer that is computed when it is read."""
    tensor = weight.const_value
    assert tensor is not None
    shape = ir.Shape(tensor.shape.numpy()[::-1])

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T))

    value = Editor(model).weight(f"{weight.name}_turned", np.zeros((0, 0), tensor.dtype.numpy()))
    value.shape = shape
    value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=value.name)
    return value
