"""The pass: what it gains on unseen data, what it leaves alone, and why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.passes.gptq import Gptq
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_weight
from onnxcomp.rewrite import Pass
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

KINDS = ("dense", "depthwise", "grouped", "strided", "sound", "gemm", "gemm transposed", "matmul and add", "matmul")


def linear(kind: str, *, bias: bool = True) -> ir.Model:
    """One linear layer named `linear`."""
    b = Builder()
    convs = {
        "dense": ((6, 8, 3, 3), {"pads": [1, 1, 1, 1]}),
        "depthwise": ((8, 1, 5, 5), {"group": 8, "pads": [2, 2, 2, 2]}),
        "grouped": ((6, 4, 3, 3), {"group": 2, "dilations": [2, 2]}),
        "strided": ((6, 8, 2, 2), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    }
    if kind in convs:
        shape, attributes = convs[kind]
        x, extra = b.input("x", [1, 8, 9, 9]), [b.floats(shape[0])] if bias else []
        return b.output(b.op("Conv", x, b.floats(*shape), *extra, name="linear", **attributes)).model()
    if kind == "sound":
        y = b.op("Conv", b.input("x", [1, 8, 33]), b.floats(6, 4, 5), name="linear", group=2, pads=[2, 2])
    elif kind.startswith("gemm"):
        extra = [b.floats(7)] if bias else []
        turned = int(kind == "gemm transposed")
        weight = b.floats(7, 24) if turned else b.floats(24, 7)
        y = b.op("Gemm", b.input("x", [32, 24]), weight, *extra, name="linear", transB=turned)
    else:
        y = b.op("MatMul", b.input("x", [2, 16, 24]), b.floats(24, 7), name="linear")
        y = b.op("Add", y, b.floats(7)) if kind == "matmul and add" else y
    return b.output(y).model()


def feeds(model: ir.Model, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs whose channels and neighbours depend on each other, not centred."""
    rng = np.random.default_rng(seed)
    value = model.graph.inputs[0]
    assert value.shape is not None
    shape = tuple(value.shape.numpy())
    axis = 1 if shape[1] == 8 else len(shape) - 1
    mix = np.random.default_rng(99).normal(size=(shape[axis], shape[axis])) / shape[axis] ** 0.5
    found = []
    for _ in range(count):
        x = np.moveaxis(np.moveaxis(rng.normal(1.0, 1.0, shape), axis, -1) @ mix, -1, axis)
        x = x + 0.7 * np.roll(x, 1, axis=-1)
        found.append({"x": x.astype(np.float32)})
    return found


def node(model: ir.Model, name: str = "linear") -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def integers(model: ir.Model, name: str = "linear") -> np.ndarray:
    stored = read_weight(node(model, name).inputs[1])
    assert stored is not None
    return stored[0]


def wrong_by(model: ir.Model, reference: ir.Model, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Errors of the output, one feed after the other along axis 0."""
    found = []
    for one in (model, reference):
        name = one.graph.outputs[0].name
        run = reference_runner(one, [name])
        found.append(np.concatenate([run(f)[name] for f in data]))
    return found[0] - found[1]


def errors(build, steps: list[Pass], run_passes) -> tuple[float, float, ir.Model]:
    """Mean squared error and RMS of the mean error of each channel, on data that calibration did not see."""
    model = build()
    data = feeds(model, 24)
    run_passes(model, *steps, data=data[:16])
    wrong = wrong_by(model, build(), data[16:])
    axis = 1 if node(model).op_type == "Conv" else -1
    by_channel = np.moveaxis(wrong, axis, 0).reshape(wrong.shape[axis], -1)
    return float(np.square(by_channel).mean()), float(np.sqrt(np.square(by_channel.mean(axis=1)).mean())), model


@pytest.mark.parametrize("kind", KINDS)
def test_lowers_the_error_on_unseen_data(kind, run_passes):
    def build():
        return linear(kind)

    plain, _, before = errors(build, [Quantize(weight_bits=4)], run_passes)
    better, mean, after = errors(build, [Quantize(weight_bits=4), Gptq()], run_passes)
    assert better < 0.92 * plain
    assert np.abs(integers(after)).max() <= 7
    assert [n.op_type for n in after.graph] == [n.op_type for n in before.graph]
    if kind != "matmul":
        assert mean < 0.35 * plain**0.5, "the bias takes the mean error"
    for a, b in zip(read_weight(node(before).inputs[1])[1:], read_weight(node(after).inputs[1])[1:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["dense", "gemm"])
def test_layer_without_a_bias_gets_one(kind, run_passes):
    def build():
        return linear(kind, bias=False)

    steps = [Quantize(weight_bits=4, bias_correction=False), Gptq()]
    plain, _, _ = errors(build, steps[:1], run_passes)
    better, _, model = errors(build, steps, run_passes)
    assert better < plain
    bias = read_weight(node(model).inputs[2])
    assert bias is not None
    assert bias[0].dtype == np.int32


def test_bias_moves_by_the_mean_of_what_the_integers_do(run_passes):
    model = linear("gemm transposed")
    data = feeds(model, 8)
    run_passes(model, Quantize(weight_bits=3), data=data)
    before = [read_weight(v) for v in node(model).inputs[1:]]
    name = node(model).inputs[0].name
    run = reference_runner(model, [name])
    rows = np.concatenate([run(f)[name] for f in data])
    mean = np.delete(rows, np.s_[1::4], axis=0).mean(axis=0, dtype=np.float64)  # the others are held out
    run_passes(model, Gptq(), data=data)
    after = [read_weight(v) for v in node(model).inputs[1:]]
    moved = after[1][0] * after[1][1].astype(np.float64) - before[1][0] * before[1][1].astype(np.float64)
    change = (before[0][0].astype(np.float64) - after[0][0]) * before[0][1][:, None]
    np.testing.assert_allclose(moved, change @ mean, rtol=0, atol=1.01 * float(after[1][1].max()))
    assert np.abs(moved).max() > 10 * after[1][1].max()


def test_two_outputs_of_one_input_share_their_moments(run_passes):
    b = Builder()
    x = b.input("x", [2, 16, 24])
    first, second = (b.op("MatMul", x, b.floats(24, 5), name=name) for name in ("first", "second"))
    model = b.output(first).output(second).model()
    data = feeds(model, 8)
    run_passes(model, Quantize(weight_bits=4), data=data)
    report = run_passes(model, Gptq(), data=data)
    assert [(e.action, e.node) for e in report.edits] == [("applied", "first"), ("applied", "second")]


@pytest.mark.parametrize("kind", ["dense", "matmul and add"])
def test_contract_on_quantized_models(kind, run_passes, capabilities):
    model, data = linear(kind), feeds(linear(kind), 8)
    run_passes(model, Quantize(weight_bits=4), data=data)
    edits = check_pass(Gptq(), model, runner=reference_runner, capabilities=capabilities, data=data)
    assert [e.action for e in edits] == ["applied"]


def test_second_application_says_why_not(run_passes):
    model = linear("gemm")
    data = feeds(model, 8)
    run_passes(model, Quantize(weight_bits=4), Gptq(), data=data)
    before = integers(model).copy()
    assert [e.detail for e in run_passes(model, Gptq(), data=data).edits] == ["gptq chose its integers already"]
    np.testing.assert_array_equal(integers(model), before)
