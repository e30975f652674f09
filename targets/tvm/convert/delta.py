"""Products and recurrent cells of streaming models, which read the weights of changed inputs only."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tvm import relax

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr
from onnxcomp.targets.tvm.convert.sparse import several, vector


class _Changes(NamedTuple):
    """What changed, whether the sums are to be started afresh, and what was sent."""

    values: Expr
    places: Expr
    counts: Expr
    afresh: Expr
    sent: Expr


def delta_matmul(call: Call) -> Expr:
    """`DeltaMatMul(x, last (..., K), total (..., N), threshold, step, w (K, N), scale (N,))`: total, and what was sent.

    Attribute `steps` is how many values of `step` there are; 0 for no rounding.
    """
    found = _changes(call, 0, 1, 2, 3, step=4, steps=int(call.attributes["steps"]))
    w, scale = call.inputs[5:7]
    total = _sums(call, found, w, scale, call.inputs[2], call.shape(2))
    return relax.Tuple([total, call.reshaped(found.sent, call.shape(0))])


def delta_gru(call: Call) -> Expr:
    """`DeltaGru(x, h, x_last, h_last, x_total, h_total, x_threshold, h_threshold, w, r, x_bias, h_bias, ones)`.

    Gives the next hidden values, what was sent of inputs and hidden values, and the totals. `ones`, (3 U,), scale sums.
    """
    units = call.shape(1)[-1]
    rows = math.prod(call.shape(1)[:-1])
    w, r, x_bias, h_bias, ones = call.inputs[8:13]
    of_x, of_h = _changes(call, 0, 2, 4, 6), _changes(call, 1, 3, 5, 7)
    totals = [
        _sums(call, found, weight, ones, call.inputs[index], (rows, 3 * units))
        for found, weight, index in ((of_x, w, 4), (of_h, r, 5))
    ]
    function = call.kernels("gates").gru(call.machine, rows=rows, units=units)
    inputs = [*totals, x_bias, h_bias, call.reshaped(call.inputs[1], (rows, units))]
    y = call.tir(function, inputs, shape=(rows, units), dtype="float32")
    outputs = (y, of_x.sent, of_h.sent, *totals)
    shapes = (call.shape(1), call.shape(0), call.shape(1), call.shape(4), call.shape(5))
    return relax.Tuple([call.reshaped(value, shape) for value, shape in zip(outputs, shapes, strict=True)])


def delta_lstm(call: Call) -> Expr:
    """`DeltaLstm(x, h, c, x_last, h_last, total, x_threshold, h_threshold, w, r, bias, ones)`.

    Gives the next hidden values and cells, what was sent of inputs and hidden values, and the total.
    """
    units = call.shape(1)[-1]
    rows = math.prod(call.shape(1)[:-1])
    w, r, bias, ones = call.inputs[8:12]
    of_x, of_h = _changes(call, 0, 3, 5, 6), _changes(call, 1, 4, 5, 7)
    sums = _sums(call, of_x, w, ones, call.inputs[5], (rows, 4 * units))
    # The total is in the first already: wherever it is left out, what is in the second is not finite, or all of it.
    added = _sums(call, of_h, r, ones, None, (rows, 4 * units))
    function = call.kernels("gates").lstm(call.machine, rows=rows, units=units)
    inputs = [sums, added, bias, call.reshaped(call.inputs[2], (rows, units))]
    shapes = [((rows, units), "float32"), ((rows, units), "float32"), ((rows, 4 * units), "float32")]
    y, cell, total = several(call, function, inputs, shapes)
    outputs = ((y, 1), (cell, 2), (of_x.sent, 0), (of_h.sent, 1), (total, 5))
    return relax.Tuple([call.reshaped(value, call.shape(index)) for value, index in outputs])


def _changes(
    call: Call, x: int, last: int, total: int, threshold: int, *, step: int | None = None, steps: int = 0
) -> _Changes:
    """Lists changes of an input; all arguments but `steps` are indices of inputs."""
    *leading, k = call.shape(x)
    rows, n = math.prod(leading), call.shape(total)[-1]
    limit, each = vector(call, threshold)
    function = call.kernels("selection").changed(rows=rows, k=k, n=n, each=each, steps=steps)
    inputs = [call.reshaped(call.inputs[index], (rows, size)) for index, size in ((x, k), (last, k), (total, n))]
    inputs += [limit, call.inputs[step] if step is not None else relax.const([0.0], "float32")]
    lists: list[tuple[Any, str]] = [((rows, k), "float32"), ((rows, k), "int32"), ((rows,), "int32")]
    return _Changes(*several(call, function, inputs, [*lists, ((rows,), "int32"), ((rows, k), "float32")]))


def _sums(call: Call, found: _Changes, w: Expr, scale: Expr, total: Expr | None, shape: Any) -> Expr:
    k, n = (int(d) for d in w.ty.shape)
    rows = math.prod(shape[:-1])
    function = call.kernels("sparse_rows").sum_rows(
        call.machine, rows=rows, k=k, n=n, dtype=str(w.ty.dtype), carried=total is not None
    )
    inputs = [found.values, found.places, found.counts, w, scale]
    if total is not None:
        inputs += [found.afresh, call.reshaped(total, (rows, n))]
    return call.reshaped(call.tir(function, inputs, shape=(rows, n), dtype="float32"), shape)


CONVERTERS: dict[str, Converter] = {"DeltaMatMul": delta_matmul, "DeltaGru": delta_gru, "DeltaLstm": delta_lstm}
"""Op type to its converter."""
