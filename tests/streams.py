"""Small models for streams, sequences for them, and the runs that the tests compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from builder import Builder
from onnx import TensorProto, helper

from onnxcomp import api
from onnxcomp.passes.delta import Delta
from onnxcomp.rewrite import Edit
from onnxcomp.targets.ort import reference_runner

Feeds = list[dict[str, Any]]


def cnn(size: int = 16, dtype: type = np.float32) -> ir.Model:
    """Convolutions of every kind, a residual sum, pooling, a concatenation, resizing, and a classifier."""
    b = Builder()
    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16

    def floats(*shape: int) -> str:
        return b.const((b.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(dtype))

    def conv(x: str, out: int, inner: int, kernel: int = 3, **attributes: Any) -> str:
        pads = [kernel // 2] * 4
        return b.op("Conv", x, floats(out, inner, kernel, kernel), floats(out), pads=pads, **attributes)

    x = b.input("x", ["batch", 3, size, size], kind)
    first = b.op("Relu", conv(x, 8, 3, strides=[2, 2]))
    depthwise = b.op("HardSwish", conv(first, 8, 1, group=8, kernel=5))
    narrow = b.op("Add", conv(depthwise, 8, 8, 1), first)
    grouped = b.op("LeakyRelu", conv(narrow, 8, 4, group=2), alpha=0.1)
    pooled = b.op("MaxPool", grouped, kernel_shape=[2, 2], strides=[2, 2])
    mean = b.op("AveragePool", narrow, kernel_shape=[2, 2], strides=[2, 2])
    both = b.op("Concat", pooled, mean, axis=1)
    scales = b.const(np.array([1, 1, 2, 2], np.float32))
    large = b.op("Resize", both, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric")
    last = conv(large, 6, 16, dilations=[1, 1])
    features = b.op("Flatten", b.op("GlobalAveragePool", b.op("Sigmoid", last)))
    return b.output(b.op("Gemm", features, floats(6, 5), floats(5), name="classify"), kind).model(opset=18)


def recurrent(op_type: str, inputs: int = 6, hidden: int = 5) -> ir.Model:
    """A GRU or LSTM of one step whose state comes in and goes out, with a projection behind it."""
    b = Builder()
    gates = {"GRU": 3, "LSTM": 4}[op_type]
    x = b.input("x", [1, "batch", inputs])
    state = [b.input(name, [1, "batch", hidden]) for name in ("h", "c")[: gates - 2]]
    weights = [b.floats(1, gates * hidden, size) for size in (inputs, hidden)]
    extra = {"linear_before_reset": 1} if op_type == "GRU" else {}
    outputs = ["y", "h_next", "c_next"][: gates - 1]
    bias = b.floats(1, 2 * gates * hidden)
    node = helper.make_node(op_type, [x, *weights, bias, "", *state], outputs, name="cell", hidden_size=hidden, **extra)
    b.nodes.append(node)
    flat = b.op("Reshape", "y", b.const(np.array([-1, hidden])))
    b.output(b.op("MatMul", flat, b.floats(hidden, 3), name="project"))
    for name in outputs[1:]:
        b.output(name)
    return b.model(opset=18)


def branching() -> ir.Model:
    """Products in front of an If and in both of its branches."""
    b = Builder()
    x, which = b.input("x", [1, 4]), b.input("which", [], TensorProto.BOOL)
    weight = b.floats(4, 4)
    branches = []
    for name in ("yes", "no"):
        node = helper.make_node("MatMul", [x, weight], [name], name=f"product_{name}")
        out = helper.make_node("Relu" if name == "yes" else "Neg", [name], [f"{name}_out"], name=f"last_{name}")
        info = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [1, 4])
        branches.append(helper.make_graph([node, out], name, [], [info]))
    inner = helper.make_node("Add", [x, x], ["twice"], name="twice")
    product = helper.make_node("MatMul", ["twice", weight], ["inside"], name="inside")
    branches[0].node.extend([inner, product, helper.make_node("Add", ["inside", "yes_out"], ["both"], name="both")])
    branches[0].output[0].name = "both"
    b.nodes.append(
        helper.make_node("If", [which], ["y"], name="choose", then_branch=branches[0], else_branch=branches[1])
    )
    return b.output("y").model(opset=18)


def looping(*, scans: bool = False) -> ir.Model:
    """A product in the body of a Loop, which may collect outputs as well."""
    b = Builder()
    x = b.input("x", [1, 4])
    weight = b.floats(4, 4)
    body_nodes = [
        helper.make_node("Add", ["s", "x"], ["mixed"], name="mix"),
        helper.make_node("Tanh", ["mixed"], ["squashed"], name="squash"),
        helper.make_node("MatMul", ["squashed", weight], ["s_next"], name="turn"),
        helper.make_node("Identity", ["go"], ["go_on"], name="go"),
        helper.make_node("Neg", ["s_next"], ["trace"], name="trace"),
    ]
    float_ = TensorProto.FLOAT
    ins = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("s", float_, [1, 4]),
    ]
    outs = [
        helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("s_next", float_, [1, 4]),
        *([helper.make_tensor_value_info("trace", float_, [1, 4])] if scans else []),
    ]
    body = helper.make_graph(body_nodes if scans else body_nodes[:-1], "body", ins, outs)
    count, go = b.const(np.array(3)), b.const(np.array(True))
    start = b.const(np.zeros((1, 4), np.float32))
    names = ["final", "traces"] if scans else ["final"]
    b.nodes.append(helper.make_node("Loop", [count, go, start], names, name="loop", body=body))
    total = b.op("Add", "final", x)
    if scans:
        total = b.op("Add", total, b.op("ReduceSum", "traces", b.const(np.array([0])), keepdims=0))
    return b.output(total).model(opset=18)


def frames(count: int, size: int = 16, seed: int = 0, dtype: type = np.float32) -> Feeds:
    """A still picture in which a small patch moves and brightens; some steps change nothing."""
    rng = np.random.default_rng(seed)
    still = rng.normal(size=(1, 3, size, size))
    found = []
    for step in range(count):
        frame = still.copy()
        place = (step // 2) % (size - 4)
        frame[..., place : place + 4, 3:7] += 0.3 + 0.02 * (step // 2)
        found.append({"x": frame.astype(dtype)})
    return found


def walk(count: int, shape: Sequence[int], seed: int = 0, share: float = 0.3) -> Feeds:
    """Vectors of which a share of elements moves in each step."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    found = []
    for _ in range(count):
        x = x + (rng.random(shape) < share) * rng.normal(size=shape)
        found.append({"x": x.astype(np.float32)})
    return found


def stream(model: ir.Model, feeds: Iterable[dict[str, Any]], names: Sequence[str] | None = None) -> list[Any]:
    """The first output, or a list of the named values, of every step; state is carried."""
    wanted = [str(model.graph.outputs[0].name)] if names is None else list(names)
    run = reference_runner(model, wanted, threads=1)
    results = []
    for feed in feeds:
        found = run(feed)
        results.append(found[wanted[0]] if names is None else [np.array(found[n]) for n in wanted])
    return results


def delta(model: ir.Model, feeds: Feeds, **options: Any) -> tuple[ir.Model, Sequence[Edit]]:
    """The step model and what the pass did; the model given stays as it is."""
    found = api.rewrite(model, None, recipe=[Delta(**options)], data=feeds, samples=None)
    return found.model, found.passes[-1].edits


def largest(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Largest difference over the largest value."""
    scale = max(float(np.abs(w).max()) for w in wanted)
    return (
        max(float(np.abs(np.subtract(f, w, dtype=np.float64)).max()) for f, w in zip(found, wanted, strict=True))
        / scale
    )
