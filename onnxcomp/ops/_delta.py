"""Ops of streaming models: what changed too little since it was last sent keeps its old value."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxcomp.ops._op import Float, PortableOp

_Bool = npt.NDArray[np.bool_]


def delta_hold(x: Float, last: Float, started: _Bool | bool, threshold: Float | float) -> Float:
    """What is sent of `x`: elements that differ from what was last sent by more than a threshold, else what was sent.

    The next call's `last` is this result, so that small changes add up until they are sent (the delta network of Neil
    et al., arXiv 1612.05571). NaN is always sent.

    Args:
        x: Values, floating, of any shape.
        last: What was last sent, like `x`.
        started: False in the first step of a stream, in which everything is sent.
        threshold: Anything that broadcasts to `x`.

    Returns:
        Like `x`.
    """
    sent = ~(np.abs(x - last) <= threshold) | ~np.asarray(started)
    held: Float = np.where(sent, x, last).astype(x.dtype, copy=False)
    return held


def delta_hold_pixels(x: Float, last: Float, started: _Bool | bool, threshold: Float | float) -> Float:
    """As `delta_hold`, but a place is sent with all its channels, once their change is large as a root mean square.

    Whoever reads a place of a map needs all its channels, so that a place with one changed channel costs as much as one
    whose channels all changed (the pixels of DeltaCNN, Parger et al., arXiv 2203.03996, with its RMS norm). NaN is
    always sent.

    Args:
        x: Values, floating, `[N, C, ...]`.
        last: What was last sent, like `x`.
        started: False in the first step of a stream, in which everything is sent.
        threshold: Scalar.

    Returns:
        Like `x`.
    """
    size = np.sqrt(np.square(x - last).mean(axis=1, keepdims=True))
    sent = ~(size <= threshold) | ~np.asarray(started)
    held: Float = np.where(sent, x, last).astype(x.dtype, copy=False)
    return held


def hold_op() -> PortableOp:
    """`DeltaHold`."""
    return PortableOp(
        name="DeltaHold",
        summary="keeps what was last sent of every element that changed by at most a threshold",
        signature="X, last like X, started [] bool, threshold that broadcasts to X -> Y like X; float",
        body="""
        DeltaHold (X, last, started, threshold) => (Y) {
            change = Sub (X, last)
            size = Abs (change)
            small = LessOrEqual (size, threshold)
            kept = And (small, started)
            Y = Where (kept, last, X)
        }
        """,
        reference=delta_hold,
    )


def hold_pixels_op() -> PortableOp:
    """`DeltaHoldPixels`."""
    return PortableOp(
        name="DeltaHoldPixels",
        summary="keeps what was last sent of every place whose channels changed by an RMS of at most a threshold",
        signature="X [N, C, ...], last like X, started [] bool, threshold [] -> Y like X; float",
        body="""
        DeltaHoldPixels (X, last, started, threshold) => (Y) {
            change = Sub (X, last)
            square = Mul (change, change)
            channels = Constant <value_ints = [1]> ()
            sum = ReduceSum <keepdims = 1> (square, channels)
            shape = Shape (X)
            place = Constant <value_ints = [1]> ()
            number = Gather (shape, place)
            count = CastLike (number, X)
            mean = Div (sum, count)
            size = Sqrt (mean)
            small = LessOrEqual (size, threshold)
            kept = And (small, started)
            Y = Where (kept, last, X)
        }
        """,
        reference=delta_hold_pixels,
    )


def sigmoid(x: Float) -> Float:
    """Logistic function, without overflow."""
    found: Float = 0.5 * (np.tanh(0.5 * x) + 1.0)
    return found


def delta_gru(
    x: Float, h: Float, x_last: Float, h_last: Float, x_threshold: Float, h_threshold: Float,
    w: Float, r: Float, b: Float,
) -> tuple[Float, Float, Float]:  # fmt: skip
    """One step of a GRU of which only changed inputs and hidden values are multiplied (DeltaGRU, arXiv 1612.05571).

    As ONNX's GRU with `linear_before_reset = 1`, gates in the order z, r, h. Only the products read held values; the
    new hidden value is a mean of the candidate and `h` itself.

    Args:
        x: Input of one step, floating, `[1, B, I]`.
        h: Hidden values before it, `[1, B, H]`.
        x_last: What was last sent of inputs, like `x`; zeros before the first step.
        h_last: What was last sent of hidden values, like `h`.
        x_threshold: Scalar, for inputs.
        h_threshold: Scalar, for hidden values.
        w: Weight of the input, `[1, 3H, I]`.
        r: Weight of the hidden values, `[1, 3H, H]`.
        b: Both biases, `[1, 6H]`.

    Returns:
        Hidden values `[1, B, H]`, and what was sent, like `x` and like `h`.
    """
    x_held, h_held = delta_hold(x, x_last, True, x_threshold), delta_hold(h, h_last, True, h_threshold)
    bias_x, bias_h = np.split(b[0], 2)
    xz, xr, xn = np.split(x_held @ w[0].T + bias_x, 3, axis=-1)
    hz, hr, hn = np.split(h_held @ r[0].T + bias_h, 3, axis=-1)
    z = sigmoid(xz + hz)
    candidate = np.tanh(xn + sigmoid(xr + hr) * hn)
    return (1 - z) * candidate + z * h, x_held, h_held


def delta_lstm(
    x: Float, h: Float, c: Float, x_last: Float, h_last: Float, x_threshold: Float, h_threshold: Float,
    w: Float, r: Float, b: Float,
) -> tuple[Float, Float, Float, Float]:  # fmt: skip
    """One step of an LSTM of which only changed inputs and hidden values are multiplied.

    As ONNX's LSTM without peepholes, gates in the order i, o, f, c.

    Args:
        x: Input of one step, floating, `[1, B, I]`.
        h: Hidden values before it, `[1, B, H]`.
        c: Cell values before it, `[1, B, H]`.
        x_last: What was last sent of inputs, like `x`; zeros before the first step.
        h_last: What was last sent of hidden values, like `h`.
        x_threshold: Scalar, for inputs.
        h_threshold: Scalar, for hidden values.
        w: Weight of the input, `[1, 4H, I]`.
        r: Weight of the hidden values, `[1, 4H, H]`.
        b: Both biases, `[1, 8H]`.

    Returns:
        Hidden and cell values, each `[1, B, H]`, and what was sent, like `x` and like `h`.
    """
    x_held, h_held = delta_hold(x, x_last, True, x_threshold), delta_hold(h, h_last, True, h_threshold)
    bias_x, bias_h = np.split(b[0], 2)
    gates = x_held @ w[0].T + h_held @ r[0].T + (bias_x + bias_h)
    i, o, f, g = np.split(gates, 4, axis=-1)
    cell = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell, x_held, h_held


def _held(name: str) -> str:
    """Holds the value `#`, without a first step of its own: zeros were sent before it."""
    return """
            #_change = Sub (#, #_last)
            #_size = Abs (#_change)
            #_small = LessOrEqual (#_size, #_threshold)
            #_held = Where (#_small, #_last, #)
    """.replace("#", name)


_PRODUCTS = """
            first = Constant <value_int = 0> ()
            second = Constant <value_int = 1> ()
            third = Constant <value_int = 2> ()
            fourth = Constant <value_int = 3> ()
            sides = Constant <value_ints = [2, -1]> ()
            biases = Reshape (B, sides)
            x_bias = Gather <axis = 0> (biases, first)
            h_bias = Gather <axis = 0> (biases, second)
            w = Gather <axis = 0> (W, first)
            r = Gather <axis = 0> (R, first)
            w_turned = Transpose <perm = [1, 0]> (w)
            r_turned = Transpose <perm = [1, 0]> (r)
            x_product = MatMul (x_held, w_turned)
            h_product = MatMul (h_held, r_turned)
            x_sum = Add (x_product, x_bias)
            h_sum = Add (h_product, h_bias)
"""


def gru_op() -> PortableOp:
    """`DeltaGRU`."""
    return PortableOp(
        name="DeltaGRU",
        summary="one step of a GRU whose products read inputs and hidden values as they were last sent",
        signature=(
            "x [1, B, I], h [1, B, H], x_last like x, h_last like h, x_threshold [], h_threshold [], W [1, 3H, I], "
            "R [1, 3H, H], B [1, 6H] -> Y [1, B, H], x_held like x, h_held like h; float; linear_before_reset = 1"
        ),
        body=f"""
        DeltaGRU (x, h, x_last, h_last, x_threshold, h_threshold, W, R, B) => (Y, x_held, h_held) {{
            {_held("x")}
            {_held("h")}
            {_PRODUCTS}
            gates = Constant <value_ints = [0, 0, 3, -1]> ()
            xs = Reshape (x_sum, gates)
            hs = Reshape (h_sum, gates)
            xz = Gather <axis = 2> (xs, first)
            hz = Gather <axis = 2> (hs, first)
            xr = Gather <axis = 2> (xs, second)
            hr = Gather <axis = 2> (hs, second)
            xn = Gather <axis = 2> (xs, third)
            hn = Gather <axis = 2> (hs, third)
            z_sum = Add (xz, hz)
            z = Sigmoid (z_sum)
            r_sum = Add (xr, hr)
            reset = Sigmoid (r_sum)
            part = Mul (reset, hn)
            n_sum = Add (xn, part)
            n = Tanh (n_sum)
            one = Constant <value_float = 1.0> ()
            unit = CastLike (one, z)
            rest = Sub (unit, z)
            fresh = Mul (rest, n)
            old = Mul (z, h)
            Y = Add (fresh, old)
        }}
        """,
        reference=delta_gru,
    )


def lstm_op() -> PortableOp:
    """`DeltaLSTM`."""
    return PortableOp(
        name="DeltaLSTM",
        summary="one step of an LSTM whose products read inputs and hidden values as they were last sent",
        signature=(
            "x [1, B, I], h [1, B, H], c [1, B, H], x_last like x, h_last like h, x_threshold [], h_threshold [], "
            "W [1, 4H, I], R [1, 4H, H], B [1, 8H] -> Y [1, B, H], cell [1, B, H], x_held like x, h_held like h; float"
        ),
        body=f"""
        DeltaLSTM (x, h, c, x_last, h_last, x_threshold, h_threshold, W, R, B) => (Y, cell, x_held, h_held) {{
            {_held("x")}
            {_held("h")}
            {_PRODUCTS}
            sum = Add (x_sum, h_sum)
            gates = Constant <value_ints = [0, 0, 4, -1]> ()
            parts = Reshape (sum, gates)
            i_sum = Gather <axis = 2> (parts, first)
            o_sum = Gather <axis = 2> (parts, second)
            f_sum = Gather <axis = 2> (parts, third)
            g_sum = Gather <axis = 2> (parts, fourth)
            i = Sigmoid (i_sum)
            o = Sigmoid (o_sum)
            f = Sigmoid (f_sum)
            g = Tanh (g_sum)
            kept = Mul (f, c)
            added = Mul (i, g)
            cell = Add (kept, added)
            size = Tanh (cell)
            Y = Mul (o, size)
        }}
        """,
        reference=delta_lstm,
    )
