"""Recurrent layers of a fixed number of steps."""

from __future__ import annotations

from tvm import relax

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr
from onnxcomp.targets.tvm.convert.sparse import several
from onnxcomp.targets.tvm.kernels.recurrent import GATES, Cell


def layer(call: Call) -> Expr:
    """`Recurrent(xs (T, B, D G U), h (D, B, U)[, c], *(r, x_bias, h_bias) a direction)`.

    Attributes are `kind`, `reverse` of the first direction, `linear_before_reset`, and how many `outputs` are wanted of
    hidden values (T, D, B, U) and last states (D, B, U).
    """
    kind = call.text("kind")
    lstm = kind == "LSTM"
    directions, rows, units = call.shape(1)
    steps, states = call.shape(0)[0], call.inputs[1 : 2 + lstm]
    found = []
    for direction in range(directions):
        cell = Cell(
            kind=kind,
            steps=steps,
            rows=rows,
            units=units,
            directions=directions,
            direction=direction,
            reverse=bool(call.attributes["reverse"]) != bool(direction),
            linear_before_reset=bool(call.attributes["linear_before_reset"]),
        )
        first = 2 + lstm + 3 * direction
        inputs = [call.inputs[0], *states, *call.inputs[first : first + 3]]
        assert call.shape(0)[2] == directions * GATES[kind] * units
        shapes = [((steps, rows, units), "float32"), *[((rows, units), "float32")] * (1 + lstm)]
        y, *last = several(call, call.kernels("recurrent").recurrent(call.machine, cell), inputs, shapes)
        found.append([call.reshaped(y, (steps, 1, rows, units)), *[call.reshaped(v, (1, rows, units)) for v in last]])
    outputs = list(zip(*found, strict=True))[: int(call.attributes["outputs"])]
    joined = [
        parts[0] if directions == 1 else call.builder.emit(relax.op.concat(list(parts), axis=int(index == 0)))
        for index, parts in enumerate(outputs)
    ]
    return joined[0] if len(joined) == 1 else relax.Tuple(joined)


CONVERTERS: dict[str, Converter] = {"Recurrent": layer}
"""Op type to its converter."""
