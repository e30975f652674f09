"""Quantized models: their layers become integer nodes, with the codes that ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm")

import onnxruntime as ort
from tvm_harness import Compiled, lowered, machines

from onnxcomp.model import infer_shapes
from onnxcomp.rewrite import Context
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.tvm.lower.integers import Integers
from onnxcomp.targets.tvm.nodes import DOMAIN

BEST = machines()[-1]


class Graph:
    """A quantized model in the making."""

    def __init__(self, shape: Sequence[int | str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.shape = shape
        self.rng = np.random.default_rng(0)
        self._count = 0

    def node(self, op_type: str, inputs: Sequence[str], **attributes: object) -> str:
        self._count += 1
        name = f"{op_type}_{self._count}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def quantized(self, value: str, scale: float, zero: int, dtype: str = "uint8") -> str:
        parameters = [self.constant(np.array(scale, np.float32)), self.constant(np.array(zero, dtype))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [value, *parameters]), *parameters])

    def weight(self, shape: Sequence[int], axis: int) -> str:
        """Of 8 bits, one scale a channel."""
        integers = self.rng.integers(-127, 128, shape).astype(np.int8)
        self.scales = self.rng.uniform(0.002, 0.01, shape[axis]).astype(np.float32)
        zeros = self.constant(np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", [self.constant(integers), self.constant(self.scales), zeros], axis=axis)

    def bias(self, scale: float) -> str:
        """In integers of the last weight's scales times `scale`."""
        integers = self.rng.integers(-3000, 3000, len(self.scales)).astype(np.int32)
        both = [self.constant(integers), self.constant(self.scales * np.float32(scale))]
        return self.node("DequantizeLinear", both, axis=0)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _ours(model: onnx.ModelProto) -> Mapping[str, int]:
    """Nodes of ours, by op type."""
    found: dict[str, int] = {}
    for node in lowered(ir.from_proto(model), [Integers(machine=BEST)]).graph:
        if node.domain == DOMAIN:
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def _both(model: onnx.ModelProto, feed: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What ours and what ONNX Runtime puts out."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ours = Compiled(ir.from_proto(model), [Integers(machine=BEST)], BEST)
    return ours.run({"x": feed}), session.run(None, {"x": feed})


def _convolutions() -> onnx.ModelProto:
    graph = Graph([1, 3, 17, 15])
    x = graph.quantized("x", 0.03, 120)
    y = graph.node("Conv", [x, graph.weight((16, 3, 3, 3), 0), graph.bias(0.03)], pads=[1, 1, 1, 1], strides=[2, 2])
    first = graph.quantized(graph.node("Relu", [y]), 0.02, 0)
    y = graph.node("Conv", [first, graph.weight((16, 1, 5, 5), 0), graph.bias(0.02)], group=16, auto_pad="SAME_UPPER")
    low, high = graph.constant(np.array(0, np.float32)), graph.constant(np.array(6, np.float32))
    deep = graph.quantized(graph.node("Clip", [y, low, high]), 0.03, 10)
    y = graph.node("Conv", [deep, graph.weight((16, 16, 1, 1), 0), graph.bias(0.03)])
    point = graph.quantized(y, 0.05, 128)
    total = graph.quantized(graph.node("Add", [point, first]), 0.04, 100)
    mean = graph.node("GlobalAveragePool", [total])
    return graph.model(graph.quantized(graph.node("Flatten", [mean]), 0.02, 90))


def _products() -> onnx.ModelProto:
    graph = Graph([2, 5, 21])
    x = graph.quantized("x", 0.03, 5, "int8")
    y = graph.node("MatMul", [x, graph.weight((21, 40), 1)])
    y = graph.quantized(y, 0.05, -3, "int8")
    y = graph.node("Reshape", [y, graph.constant(np.array([10, 40], np.int64))])
    y = graph.quantized(y, 0.05, -3, "int8")
    y = graph.node("Gemm", [y, graph.weight((7, 40), 0), graph.bias(0.05)], transB=1)
    return graph.model(graph.quantized(y, 0.1, 4, "int8"))


def _elementwise() -> onnx.ModelProto:
    graph = Graph([1, 4, 6, 6])
    a, b = graph.quantized("x", 0.03, 120), graph.quantized("x", 0.05, 100)
    product = graph.quantized(graph.node("Mul", [a, b]), 0.06, 40)
    gate = graph.quantized(graph.node("Sigmoid", [product]), 1 / 256, 0)
    pooled = graph.quantized(
        graph.node("MaxPool", [a], kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]), 0.03, 120
    )
    return graph.model(graph.quantized(graph.node("Concat", [gate, pooled, b], axis=1), 0.04, 110))


CASES: list[tuple[Callable[[], onnx.ModelProto], tuple[int, ...], Mapping[str, int]]] = [
    (_convolutions, (1, 3, 17, 15), {"QConv": 2, "QDepthwise": 1, "QAdd": 1, "QMean": 1}),
    (_products, (2, 5, 21), {"QGemm": 2}),
    (_elementwise, (1, 4, 6, 6), {"QMul": 1, "QTable": 4}),
]


@pytest.mark.parametrize(("make", "shape", "kinds"), CASES, ids=["convolutions", "products", "elementwise"])
def test_codes_are_those_of_onnx_runtime(
    make: Callable[[], onnx.ModelProto], shape: tuple[int, ...], kinds: Mapping[str, int]
) -> None:
    model = make()
    found = _ours(model)
    assert {name: found.get(name) for name in kinds} == kinds
    feed = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    (ours,), (theirs,) = _both(model, feed)
    np.testing.assert_array_equal(ours, theirs)


def test_a_product_without_a_quantizer_puts_out_floats() -> None:
    graph = Graph(["rows", 24])
    x = graph.quantized("x", 0.03, 130)
    y = graph.node("MatMul", [x, graph.weight((24, 10), 1)])
    model = graph.model(graph.node("Add", [y, graph.constant(graph.rng.normal(size=10).astype(np.float32))]))
    assert _ours(model)["QGemm"] == 1
    (ours,), (theirs,) = _both(model, np.random.default_rng(1).normal(size=(30, 24)).astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_weight_that_does_not_fit_is_left_in_float() -> None:
    graph = Graph([4, 8])
    x = graph.quantized("x", 0.03, 130)
    integers = graph.rng.integers(0, 256, (8, 3)).astype(np.uint8)
    integers[0, :2] = 0, 255
    parameters = [graph.constant(np.array(0.01, np.float32)), graph.constant(np.array(100, np.uint8))]
    weight = graph.node("DequantizeLinear", [graph.constant(integers), *parameters])
    model = graph.model(graph.node("MatMul", [x, weight]))
    assert "QGemm" not in _ours(model)


def test_groups_are_refused_with_the_reason() -> None:
    graph = Graph([1, 8, 5, 5])
    x = graph.quantized("x", 0.03, 130)
    model = graph.model(graph.node("Conv", [x, graph.weight((8, 4, 1, 1), 0)], group=2))
    inferred = ir.from_proto(model)
    infer_shapes(inferred)
    edits = Integers(machine=BEST).apply(inferred, Context(capabilities=OrtCpu().capabilities()))
    assert [edit.action for edit in edits] == ["refused"]
    assert "groups" in edits[0].detail


def test_ranges_found_at_run_time() -> None:
    graph = Graph(["rows", 20])
    graph.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="quantize"))
    outputs = []
    for n in (6, 40):
        weight = graph.constant(graph.rng.integers(-127, 128, (20, n)).astype(np.int8))
        scales = graph.constant(graph.rng.uniform(0.002, 0.01, n).astype(np.float32))
        sums = graph.node("Cast", [graph.node("MatMulInteger", ["q", weight, "z"])], to=TensorProto.FLOAT)
        y = graph.node("Mul", [sums, graph.node("Mul", ["s", scales])])
        outputs.append(graph.node("Add", [y, graph.constant(graph.rng.normal(size=n).astype(np.float32))]))
    model = graph.model(*outputs)
    assert _ours(model)["QGemm"] == 2
    rng = np.random.default_rng(1)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ours = Compiled(ir.from_proto(model), [Integers(machine=BEST)], BEST)
    for feed in (rng.normal(size=(13, 20)), rng.normal(size=(1, 20)) + 9, np.zeros((2, 20))):
        feeds = {"x": feed.astype(np.float32)}
        for mine, theirs in zip(ours.run(feeds), session.run(None, feeds), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-5)
