"""One op at a time between two layers: channels move through it, and outputs stay what they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import TensorProto

from onnxcomp.passes.permute import Permute

PLAIN = {"score": "magnitude", "include_ends": True}


def positive(b: Builder, *shape: int) -> str:
    return b.const(b.rng.uniform(0.5, 2, shape).astype(np.float32))


def ints(b: Builder, *numbers: int) -> str:
    return b.const(np.array(numbers, np.int64))


def scalar(b: Builder, number: float) -> str:
    return b.const(np.float32(number))


# Ops on (2, 5, 16), channels last. Each gives a value that MatMul reads along its last axis, of `width` channels.
ROWS: dict[str, Callable[[Builder, str], str]] = {
    **{op: lambda b, x, op=op: b.op(op, x) for op in ("Abs", "Elu", "Erf", "Exp", "LeakyRelu", "Neg", "Softplus",
                                                      "Tanh", "HardSigmoid", "Identity", "Dropout", "Floor")},
    "softmax over the channels": lambda b, x: b.op("Softmax", x, axis=-1),
    "softmax over the tokens": lambda b, x: b.op("Softmax", x, axis=1),
    "log softmax": lambda b, x: b.op("LogSoftmax", x, axis=-1),
    "layer norm": lambda b, x: b.op("LayerNormalization", x, b.floats(16), b.floats(16), axis=-1),
    "layer norm over tokens, too": lambda b, x: b.op("LayerNormalization", x, b.floats(5, 16), b.floats(5, 16), axis=1),
    "unit length": lambda b, x: b.op("LpNormalization", x, axis=-1),
    "mean over the tokens": lambda b, x: b.op("ReduceMean", x, axes=[1], keepdims=0),
    "largest token": lambda b, x: b.op("ReduceMax", x, axes=[1], keepdims=1),
    "less the mean": lambda b, x: b.op("Sub", x, b.op("ReduceMean", x, axes=[2], keepdims=1)),
    "slice of the tokens": lambda b, x: b.op("Slice", x, ints(b, 1), ints(b, 4), ints(b, 1)),
    "last token": lambda b, x: b.op("Gather", x, b.const(np.int64(4)), axis=1),
    "tokens by number": lambda b, x: b.op("Gather", x, b.input("at", [3], TensorProto.INT64), axis=1),
    "tile": lambda b, x: b.op("Tile", x, ints(b, 1, 2, 1)),
    "tile of the channels": lambda b, x: b.op("Tile", x, ints(b, 1, 1, 2)),
    "expand": lambda b, x: b.op("Expand", b.op("Unsqueeze", x, ints(b, 0)), ints(b, 3, 2, 5, 16)),
    "reverse": lambda b, x: b.op("Gather", x, ints(b, *range(15, -1, -1)), axis=2),
    "first half of the channels": lambda b, x: b.op("Slice", x, ints(b, 0), ints(b, 8), ints(b, 2)),
    "every second channel": lambda b, x: b.op("Slice", x, ints(b, 0), ints(b, 16), ints(b, 2), ints(b, 2)),
    "twice": lambda b, x: b.op("Concat", x, b.op("Relu", x), axis=2),
    "beside others": lambda b, x: b.op("Concat", x, b.floats(2, 5, 8), axis=2),
    "behind other tokens": lambda b, x: b.op("Concat", b.floats(2, 1, 16), x, axis=1),
    "where": lambda b, x: b.op("Where", b.op("Greater", x, b.floats(16)), x, b.floats(5, 16)),
    "power": lambda b, x: b.op("Pow", b.op("Abs", x), positive(b, 16)),
    "clip": lambda b, x: b.op("Clip", x, scalar(b, -1), scalar(b, 1)),
    "factor of each head": lambda b, x: b.op("Reshape", b.op("Mul", b.op("Reshape", x, ints(b, 2, 5, 2, 8)),
                                                             positive(b, 2, 1)), ints(b, 2, 5, 16)),
    "factor of each channel of a head": lambda b, x: b.op(
        "Reshape", b.op("Mul", b.op("Reshape", x, ints(b, 2, 5, 2, 8)), positive(b, 8)), ints(b, 2, 5, 16)),
    "half precision": lambda b, x: b.op("Cast", b.op("Cast", x, to=TensorProto.FLOAT16), to=TensorProto.FLOAT),
    "step of each channel": lambda b, x: _rounded(b, x),
    "einsum": lambda b, x: b.op("Einsum", x, b.floats(16, 16), equation="btc,cd->btd"),
    "other tokens": lambda b, x: b.op("MatMul", b.floats(5, 5), x),
    "columns": lambda b, x: b.op("Transpose", b.op("MatMul", b.floats(16, 2), b.op("Reshape", x, ints(b, 2, 80))),
                                 perm=[1, 0]),
    "gram": lambda b, x: b.op("MatMul", b.op("MatMul", x, b.op("Transpose", x, perm=[0, 2, 1])), x),
    "flat tokens": lambda b, x: b.op("Reshape", x, ints(b, 10, 16)),
}  # fmt: skip

# Ops on (2, 16, 6, 6), channels first.
IMAGES: dict[str, Callable[[Builder, str], str]] = {
    "max pool": lambda b, x: b.op("MaxPool", x, kernel_shape=[2, 2]),
    "average pool": lambda b, x: b.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "global pool": lambda b, x: b.op("GlobalMaxPool", x),
    "instance norm": lambda b, x: b.op("InstanceNormalization", x, b.floats(16), b.floats(16)),
    "batch norm": lambda b, x: b.op("BatchNormalization", x, *(positive(b, 16) for _ in range(4))),
    "slope of each channel": lambda b, x: b.op("PRelu", x, positive(b, 16, 1, 1)),
    "transposed convolution": lambda b, x: b.op("ConvTranspose", x, b.floats(16, 16, 2, 2), b.floats(16)),
    "depthwise, transposed": lambda b, x: b.op("ConvTranspose", x, b.floats(16, 1, 2, 2), b.floats(16), group=16),
    "depthwise, two of each": lambda b, x: b.op("Conv", x, b.floats(32, 1, 3, 3), b.floats(32), group=16),
    "groups": lambda b, x: b.op("Conv", x, b.floats(16, 8, 3, 3), b.floats(16), group=2),
    "pad": lambda b, x: b.op("Pad", x, ints(b, 0, 0, 1, 2, 0, 0, 0, 1), mode="reflect"),
    "resize": lambda b, x: b.op("Resize", x, "", b.const(np.array([1, 1, 2, 1.5], np.float32)), mode="linear"),
    "places by row": lambda b, x: b.op("Transpose", b.op("Softmax", b.op("Reshape", x, ints(b, 2, 16, 36)), axis=2),
                                       perm=[0, 1, 2]),
    "sum of two": lambda b, x: b.op("Add", x, b.op("Relu", b.op("Conv", x, b.floats(16, 16, 1, 1)))),
}  # fmt: skip


def _rounded(b: Builder, x: str) -> str:
    steps, zeros = positive(b, 16), b.const(b.rng.integers(0, 9, 16).astype(np.uint8))
    return b.op("DequantizeLinear", b.op("QuantizeLinear", x, steps, zeros, axis=2), steps, zeros, axis=2)


def compare(model: ir.Model, given: dict[str, np.ndarray], run_passes, outputs) -> list:
    expected = outputs(model, given)
    edits = run_passes(model, Permute(**PLAIN)).edits
    for found, wanted in zip(outputs(model, given), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    return [e for e in edits if e.action == "applied"]


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, b, run_passes, outputs):
    x = b.op("Add", b.op("MatMul", b.input("x", [2, 5, 6]), b.floats(6, 16), name="up"), b.floats(16))
    y = ROWS[case](b, x)
    width = {"tile of the channels": 32, "first half of the channels": 8, "every second channel": 8, "twice": 32,
             "beside others": 24, "columns": 16}.get(case, 16)  # fmt: skip
    if case == "columns":
        y = b.op("Reshape", y, ints(b, 5, 16, -1))
        y = b.op("Transpose", y, perm=[0, 2, 1])
    model = b.output(b.op("MatMul", y, b.floats(width, 12), name="down")).model()
    rng = np.random.default_rng(0)
    given = {"x": rng.normal(size=(2, 5, 6)).astype(np.float32)}
    if case == "tokens by number":
        given["at"] = np.array([4, 0, 0])
    done = compare(model, given, run_passes, outputs)
    assert any(e.node in ("down", "Einsum") for e in done) or case in ("reverse", "columns")


@pytest.mark.parametrize("case", IMAGES)
def test_images(case, b, run_passes, outputs):
    x = b.op("Conv", b.input("x", [2, 3, 6, 6]), b.floats(16, 3, 1, 1), b.floats(16), name="up")
    y = IMAGES[case](b, x)
    width = 32 if case == "depthwise, two of each" else 16
    weight = b.floats(12, width, *([1] if case == "places by row" else [1, 1]))
    model = b.output(b.op("Conv", y, weight, name="down")).model()
    given = {"x": np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)}
    done = compare(model, given, run_passes, outputs)
    assert bool(done) == (case != "depthwise, two of each")  # its pairs would have to move as pairs


def test_places_of_maxima_count_channels(b, run_passes, outputs):
    x = b.op("Conv", b.input("x", [2, 3, 6, 6]), b.floats(16, 3, 1, 1), name="up")
    y = b.op("MaxPool", x, kernel_shape=[2, 2], name="pool")
    b.nodes[-1].output.append("places")
    b.output("places", TensorProto.INT64)
    model = b.output(b.op("Conv", y, b.floats(12, 16, 1, 1), name="down")).model()
    given = {"x": np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)}
    assert not compare(model, given, run_passes, outputs)


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_op(rank, b, run_passes, outputs):
    """Four heads of queries, two of values."""
    x = b.input("x", [2, 5, 6])
    q, k, v = (b.op("MatMul", x, b.floats(6, n), name=f"proj{i}") for i, n in enumerate((32, 16, 16)))
    if rank == 4:
        q, k, v = (b.op("Transpose", b.op("Reshape", t, ints(b, 0, 0, -1, 8)), perm=[0, 2, 1, 3]) for t in (q, k, v))
        y = b.op("Transpose", b.op("Attention", q, k, v), perm=[0, 2, 1, 3])
        y = b.op("Reshape", y, ints(b, 0, 0, 32))
    else:
        y = b.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=2)
    model = b.output(b.op("MatMul", y, b.floats(32, 6), name="o")).model(opset=23)
    given = {"x": np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)}
    assert [e.node for e in compare(model, given, run_passes, outputs)] == ["o"]


@pytest.mark.parametrize("version", [11, 17])
def test_old_softmax_takes_all_axes_behind(version, b, run_passes, outputs):
    x = b.op("MatMul", b.input("x", [2, 5, 6]), b.floats(6, 16), name="up")
    model = b.output(b.op("MatMul", b.op("Softmax", x, axis=1), b.floats(16, 12), name="down")).model(opset=version)
    given = {"x": np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)}
    assert compare(model, given, run_passes, outputs)


def test_two_axes_of_one_weight(b, run_passes, outputs):
    """A weight that reads a stream and writes to it: both of its sides move."""
    x = b.op("MatMul", b.input("x", [4, 6]), b.floats(6, 16), name="up")
    for i in range(2):
        x = b.op("Add", x, b.op("MatMul", x, b.floats(16, 16), name=f"layer{i}"))
    model = b.output(b.op("MatMul", x, b.floats(16, 12), name="down")).model()
    given = {"x": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)}
    assert {e.node for e in compare(model, given, run_passes, outputs)} == {"layer0", "layer1", "down"}
