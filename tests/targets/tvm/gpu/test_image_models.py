"""Networks of float32 convolutions on a GPU: all of them by kernels of ours, and right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402
from tvm import relax  # noqa: E402
from tvm_harness import lowered, machines  # noqa: E402

cuda_emulator.require()

from onnxcomp.model import name_nodes  # noqa: E402
from onnxcomp.targets.ort import reference_runner  # noqa: E402
from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.importing import to_relax  # noqa: E402
from onnxcomp.targets.tvm.lower.everything import Kernels  # noqa: E402
from onnxcomp.targets.tvm.lower.prepare import Prepare  # noqa: E402
from onnxcomp.targets.tvm.nodes import DOMAIN  # noqa: E402
from onnxcomp.targets.tvm.pipeline import build  # noqa: E402

CPU = machines()[-1]
GPU = replace(gpu("jetson-orin", frozenset()), triple=CPU.triple, cpu=CPU.cpu, features=CPU.features)


def _network(batch):
    """Its output, and a network with what small ones for images are made of."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def weight(*shape):
        array = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{len(weights)}"))
        return weights[-1].name

    def op(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, inputs, [f"t{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def conv(x, inputs, outputs, size, stride=1, group=1):
        kernel, bias = weight(outputs, inputs // group, size, size), weight(outputs)
        return op("Conv", x, kernel, bias, strides=[stride, stride], pads=[size // 2] * 4, group=group)

    x = op("Relu", conv("x", 3, 24, 3, 2))
    first = op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = op("HardSwish", conv(first, 24, 24, 3, 1, 24))
    gate = op("Relu", conv(op("GlobalAveragePool", x), 24, 8, 1))
    x = op("Mul", x, op("HardSigmoid", conv(gate, 8, 24, 1)))
    x = op("Add", conv(x, 24, 24, 1), first)
    x = op("Concat", op("Relu", conv(x, 24, 20, 3)), op("Sigmoid", conv(x, 24, 12, 1, 1, 4)), axis=1)
    x = op("Relu", conv(x, 32, 64, 3, 2))
    y = op("Gemm", op("Flatten", op("GlobalAveragePool", x)), weight(10, 64), weight(10), transB=1)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 32, 40])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        weights,
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    name_nodes(model)
    return y, model


def test_network_of_convolutions():
    y, model = _network("batch")
    working = lowered(model, [Prepare(), Kernels(machine=GPU)])
    ours = [node.op_type for node in working.graph if node.domain == DOMAIN]
    assert {kind: ours.count(kind) for kind in set(ours)} == {"Conv": 8, "Pool": 3, "Concat": 1, "Gemm": 1}
    imported = to_relax(working, GPU)
    machine = relax.VirtualMachine(build(imported.module, GPU), tvm.cuda())
    weights = [tvm.runtime.tensor(w.numpy(), tvm.cuda()) for w in imported.weights.values()]
    for images in (1, 3):
        x = np.random.default_rng(1).standard_normal((images, 3, 32, 40)).astype(np.float32)
        found = machine["main"](tvm.runtime.tensor(x, tvm.cuda()), *weights)
        got = (found if hasattr(found, "numpy") else found[0]).numpy()
        np.testing.assert_allclose(got, reference_runner(model, [y])({"x": x})[y], rtol=1e-5, atol=3e-6)
