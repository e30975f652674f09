"""Quantized models on a GPU: the results are those of ONNX Runtime, codes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402
import onnxruntime as ort  # noqa: E402
from tvm import relax  # noqa: E402
from tvm_harness import lowered, machines  # noqa: E402

cuda_emulator.require()

from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.importing import to_relax  # noqa: E402
from onnxcomp.targets.tvm.lower.everything import Kernels  # noqa: E402
from onnxcomp.targets.tvm.lower.prepare import Prepare  # noqa: E402
from onnxcomp.targets.tvm.nodes import DOMAIN  # noqa: E402
from onnxcomp.targets.tvm.pipeline import build  # noqa: E402

CPU = machines()[-1]
GPU = replace(gpu("jetson-orin", frozenset()), triple=CPU.triple, cpu=CPU.cpu, features=CPU.features)


class Network:
    """A quantized network in the making."""

    def __init__(self, shape: Sequence[int | str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape = shape
        self.rng = np.random.default_rng(0)

    def node(self, op_type: str, inputs: Sequence[str], **attributes: object) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def codes(self, value: str, scale: float, zero: int, dtype: str = "uint8") -> str:
        parameters = [self.constant(np.array(scale, np.float32)), self.constant(np.array(zero, dtype))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [value, *parameters]), *parameters])

    def layer(self, op_type: str, x: str, scale: float, shape: Sequence[int], **attributes: object) -> str:
        """With a weight of one scale an output, and a bias; `scale` is that of `x`."""
        scales = self.rng.uniform(0.002, 0.01, shape[0]).astype(np.float32)
        weight = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        given = [self.constant(scales), self.constant(np.zeros(shape[0], np.int8))]
        bias = self.constant(self.rng.integers(-3000, 3000, shape[0]).astype(np.int32))
        inputs = [
            self.node("DequantizeLinear", [weight, *given], axis=0),
            self.node("DequantizeLinear", [bias, self.constant(scales * np.float32(scale))], axis=0),
        ]
        return self.node(op_type, [x, *inputs], **attributes)

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _convolutions() -> onnx.ModelProto:
    net = Network([1, 3, 17, 15])
    x = net.codes("x", 0.03, 120)
    y = net.layer("Conv", x, 0.03, (16, 3, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2])
    first = net.codes(net.node("Relu", [y]), 0.02, 0)
    y = net.codes(net.layer("Conv", first, 0.02, (16, 1, 3, 3), group=16, pads=[1, 1, 1, 1]), 0.03, 110)
    y = net.codes(net.layer("Conv", y, 0.03, (16, 16, 1, 1)), 0.05, 128)
    total = net.codes(net.node("Add", [y, first]), 0.04, 100)
    gate = net.codes(net.node("Sigmoid", [total]), 1 / 256, 0)
    product = net.codes(net.node("Mul", [total, gate]), 0.03, 60)
    y = net.codes(net.layer("Conv", product, 0.03, (20, 16, 3, 3)), 0.1, 118)
    mean = net.codes(net.node("GlobalAveragePool", [y]), 0.02, 128)
    mean = net.codes(net.node("Flatten", [mean]), 0.02, 128)
    return net.model(net.codes(net.layer("Gemm", mean, 0.02, (10, 20), transB=1), 0.02, 120))


def _products() -> onnx.ModelProto:
    net = Network(["rows", 24])
    x = net.codes("x", 0.03, 5, "int8")
    y = net.codes(net.node("Relu", [net.layer("Gemm", x, 0.03, (40, 24), transB=1)]), 0.05, -128, "int8")
    return net.model(net.codes(net.layer("Gemm", y, 0.05, (7, 40), transB=1), 0.1, 4, "int8"))


def _dynamic() -> onnx.ModelProto:
    """Its range is found at run time."""
    net = Network(["rows", 20])
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="quantize"))
    weight = net.constant(net.rng.integers(-127, 128, (20, 40)).astype(np.int8))
    scales = net.constant(net.rng.uniform(0.002, 0.01, 40).astype(np.float32))
    sums = net.node("Cast", [net.node("MatMulInteger", ["q", weight, "z"])], to=TensorProto.FLOAT)
    y = net.node("Mul", [sums, net.node("Mul", ["s", scales])])
    return net.model(net.node("Add", [y, net.constant(net.rng.normal(size=40).astype(np.float32))]))


@pytest.mark.parametrize(
    ("model", "shapes", "kinds", "tolerance"),
    [
        (_convolutions(), [(1, 3, 17, 15)], {"QConv", "QDepthwise", "QAdd", "QMul", "QTable", "QMean", "QGemm"}, 0.0),
        (_products(), [(5, 24), (30, 24)], {"QGemm"}, 0.0),
        (_dynamic(), [(13, 20)], {"DynamicRange", "DynamicQuantize", "QGemm"}, 2e-6),
    ],
    ids=["convolutions", "products", "dynamic"],
)
def test_results_are_those_of_onnx_runtime(
    model: onnx.ModelProto, shapes: Sequence[tuple[int, ...]], kinds: set[str], tolerance: float
) -> None:
    working = lowered(ir.from_proto(model), [Prepare(), Kernels(machine=GPU)])
    assert kinds <= {node.op_type for node in working.graph if node.domain == DOMAIN}
    imported = to_relax(working, GPU)
    machine = relax.VirtualMachine(build(imported.module, GPU), tvm.cuda())
    weights = [tvm.runtime.tensor(w.numpy(), tvm.cuda()) for w in imported.weights.values()]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for shape in shapes:
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        found = machine["main"](tvm.runtime.tensor(x, tvm.cuda()), *weights)
        (wanted,) = session.run(None, {"x": x})
        found = (found if hasattr(found, "numpy") else found[0]).numpy()
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
        assert np.unique(wanted).size > 3
