"""Range between sizes of tensors: TVM's importer makes a tensor of a length that its compiler then does not know."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.sym.analyzer import Analyzer, ConstIntBound
from tvm.tirx.analysis import undefined_vars

from onnxcomp.targets.tvm.convert._call import Call, Expr, kernel_call


def between_sizes(call: Call) -> Expr | None:
    """`Range(start, limit, step)` as an int64 tensor; None unless it is between sizes, with a constant step."""
    start, limit, step = call.inputs
    ends, by = [_size(start), _size(limit)], _size(step)
    if any(end is None for end in ends) or not isinstance(by, int) or by < 1:
        return None
    if all(isinstance(end, int) for end in ends):
        return None  # a constant, which TVM computes
    first, last = (tirx.const(end, "int64") if isinstance(end, int) else end for end in ends)
    output = relax.TensorType((_length(first, last, by),), "int64")
    return kernel_call(call.builder, call.kind, call.kernels("ranges").numbers(by), [first], output)


def _length(first: Any, last: Any, step: int) -> Any:
    """How many numbers there are, as simple as it can be: it has to be seen to equal other sizes."""
    analyzer = Analyzer()
    for size in {*undefined_vars(first), *undefined_vars(last)}:
        analyzer.update(size, ConstIntBound(0, ConstIntBound.POS_INF))
    distance = analyzer.simplify(last - first)
    if not analyzer.can_prove(distance >= 0):
        distance = tirx.max(distance, tirx.const(0, "int64"))
    return analyzer.simplify((distance + (step - 1)) // step)


def _size(value: Any) -> Any | None:
    """An int, an expression of sizes, or None for anything else."""
    if tvm.ir.is_prim_expr(value):
        return value
    if (
        isinstance(value, tvm.ir.GenericConst)
        and value.value.numpy().dtype.kind == "i"
        and value.value.numpy().size == 1
    ):
        return int(value.value.numpy().item())
    return None
