"""Products and MLPs that leave out inputs: a kernel lists those that count, others read the weights of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import relax

from onnxcomp.targets.tvm.convert._call import OPAQUE, Call, Converter, Expr
from onnxcomp.targets.tvm.nodes import OWN

_Selection = tuple[Expr, Expr, Expr]
"""Values, places and counts."""


def several(call: Call, function: Any, inputs: Sequence[Expr], outputs: Sequence[tuple[Any, str]]) -> list[Expr]:
    """Emits a call of a kernel with several outputs, which it takes last.

    Args:
        call: The node.
        function: The `tvm.tirx.PrimFunc`.
        inputs: What it reads.
        outputs: Shape and type of each.
    """
    function = function.with_attr("op_pattern", OPAQUE).with_attr(OWN, 1).without_attr("global_symbol")
    name = call.builder.add_func(function, call.kind)
    types = [relax.TensorType(shape, dtype) for shape, dtype in outputs]
    made = call.builder.emit(relax.call_tir(name, list(inputs), out_ty=types))
    return [call.builder.emit(relax.TupleGetItem(made, index)) for index in range(len(types))]


def flat(call: Call, index: int) -> tuple[Expr, Any, int]:
    """An input of shape (..., K) as (rows, K); with the rows and K."""
    *leading, k = call.shape(index)
    rows = math.prod(leading)
    return call.reshaped(call.inputs[index], (rows, k)), rows, k


def fixed(rows: Any) -> int | None:
    """A number of rows, None if it is not known."""
    return rows if isinstance(rows, int) else None


def vector(call: Call, index: int) -> tuple[Expr, bool]:
    """A scalar or a vector as a vector; and whether it has more than one value."""
    size = math.prod(call.shape(index))
    return call.reshaped(call.inputs[index], (size,)), size > 1


def sparse_matmul(call: Call) -> Expr:
    """`SparseMatMul(x (..., K), *weight, limit)`; see `onnxcomp.targets.tvm.lower.sparse`."""
    x, rows, k = flat(call, 0)
    n, weight = int(call.attributes["n"]), call.inputs[1:4]
    if call.text("select") == "largest":
        found = _listed(call, call.kernels("selection").largest(rows=fixed(rows), k=k), [x, call.inputs[-1]], rows, k)
    else:
        found = _above(call, x, rows, k)
    return call.reshaped(_sums(call, found, rows, k, n, weight), (*call.shape(0)[:-1], n))


def gated_mlp(call: Call) -> Expr:
    """`GatedMLP(gates (..., F), x (..., K), *up, *down, threshold)`; see `onnxcomp.targets.tvm.lower.sparse`."""
    gates, rows, f = flat(call, 0)
    x, _, k = flat(call, 1)
    n, parts = int(call.attributes["n"]), 3 if call.text("format") == "int4" else 2
    up, down = call.inputs[2 : 2 + parts], call.inputs[2 + parts : 2 + 2 * parts]
    values, places, counts = _above(call, gates, rows, f)
    if parts == 3:
        function = call.kernels("gated_mlp").neurons_int4(call.machine, rows=fixed(rows), k=k, f=f, **_scales(up))
    else:
        function = call.kernels("gated_mlp").neurons(call.machine, rows=fixed(rows), k=k, f=f, dtype=call.dtype(2))
    hidden = call.tir(function, [values, places, counts, x, *up], shape=(rows, f), dtype="float32")
    return call.reshaped(_sums(call, (hidden, places, counts), rows, f, n, down), (*call.shape(0)[:-1], n))


def nm_matmul(call: Call) -> Expr:
    """`NmMatMul(x (..., K), values, places, scale)`; see `onnxcomp.targets.tvm.lower.nm`."""
    x, rows, k = flat(call, 0)
    n, kept = int(call.attributes["n"]), int(call.attributes["kept"])
    function = call.kernels("nm").nm_matmul(call.machine, rows=fixed(rows), k=k, n=n, kept=kept, dtype=call.dtype(1))
    found = call.tir(function, [x, *call.inputs[1:]], shape=(rows, n), dtype="float32")
    return call.reshaped(found, (*call.shape(0)[:-1], n))


def _above(call: Call, x: Expr, rows: Any, k: int) -> _Selection:
    threshold, each = vector(call, len(call.inputs) - 1)
    one_sided = bool(call.attributes.get("one_sided", 0))
    function = call.kernels("selection").above(rows=fixed(rows), k=k, each=each, one_sided=one_sided)
    return _listed(call, function, [x, threshold], rows, k)


def _listed(call: Call, function: Any, inputs: Sequence[Expr], rows: Any, k: int) -> _Selection:
    outputs = [((rows, k), "float32"), ((rows, k), "int32"), ((rows,), "int32")]
    values, places, counts = several(call, function, inputs, outputs)
    return values, places, counts


def _sums(call: Call, found: _Selection, rows: Any, k: int, n: int, weight: Sequence[Expr]) -> Expr:
    if call.text("format") == "int4":
        function = call.kernels("sparse_rows").sum_rows_int4(
            call.machine, rows=fixed(rows), k=k, n=n, **_scales(weight)
        )
    else:
        weight = weight[:2]
        function = call.kernels("sparse_rows").sum_rows(
            call.machine, rows=fixed(rows), k=k, n=n, dtype=str(weight[0].ty.dtype)
        )
    return call.tir(function, [*found, *weight], shape=(rows, n), dtype="float32")


def _scales(weight: Sequence[Expr]) -> dict[str, Any]:
    return {"scale": str(weight[1].ty.dtype), "zeros": len(weight[2].ty.shape) > 1}


CONVERTERS: dict[str, Converter] = {"SparseMatMul": sparse_matmul, "GatedMLP": gated_mlp, "NmMatMul": nm_matmul}
"""Op type to its converter."""
