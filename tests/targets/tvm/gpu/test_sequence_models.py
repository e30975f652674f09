"""Models of sequences on a GPU, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
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

from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.importing import to_relax  # noqa: E402
from onnxcomp.targets.tvm.lower.everything import Kernels  # noqa: E402
from onnxcomp.targets.tvm.lower.prepare import Prepare  # noqa: E402
from onnxcomp.targets.tvm.nodes import DOMAIN  # noqa: E402
from onnxcomp.targets.tvm.pipeline import build  # noqa: E402

cuda_emulator.require()

CPU = machines()[-1]
GPU = replace(gpu("jetson-orin", frozenset()), triple=CPU.triple, cpu=CPU.cpu, features=CPU.features)
RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model(nodes: list[onnx.NodeProto], inputs: Mapping[str, list], outputs: list[str], weights: Mapping) -> ir.Model:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    wanted = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "sequence", given, wanted, constants)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def text_model() -> ir.Model:
    """A layer with a cache that grows, and scores of all words by one another."""
    node = helper.make_node
    nodes = [node("LayerNormalization", ["x", "scale", "bias"], ["normed"], axis=-1)]
    for part in "qkv":
        nodes += [
            node("MatMul", ["normed", f"w{part}"], [f"{part}_flat"]),
            node("Reshape", [f"{part}_flat", "split"], [f"{part}_split"]),
            node("Transpose", [f"{part}_split"], [part], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        node("Concat", ["past_k", "k"], ["next_k"], axis=2),
        node("Concat", ["past_v", "v"], ["next_v"], axis=2),
        node("Transpose", ["next_k"], ["k_turned"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "k_turned"], ["scores"]),
        node("Mul", ["scores", "quarter"], ["scaled"]),
        node("Softmax", ["scaled"], ["weights"], axis=-1),
        node("MatMul", ["weights", "next_v"], ["mixed"]),
        node("Transpose", ["mixed"], ["mixed_turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["mixed_turned", "join"], ["joined"]),
        node("Add", ["x", "joined"], ["y"]),
        node("Transpose", ["y"], ["y_turned"], perm=[0, 2, 1]),
        node("MatMul", ["y", "y_turned"], ["likeness"]),
        node("Softmax", ["likeness"], ["nearest"], axis=-1),
    ]
    weights = {f"w{part}": values(24, 24) / 5 for part in "qkv"}
    weights |= {"scale": values(24), "bias": values(24), "quarter": np.array(0.25, np.float32)}
    weights |= {"split": np.array([0, 0, 3, 8]), "join": np.array([0, 0, 24])}
    cache = [1, 3, "past", 8]
    inputs = {"x": [1, "words", 24], "past_k": cache, "past_v": cache}
    return model(nodes, inputs, ["y", "next_k", "next_v", "nearest"], weights)


def recurrent_model() -> ir.Model:
    """An LSTM in two directions, a launch a step, and a GRU."""
    node = helper.make_node
    nodes = [
        node("LSTM", ["x", "w", "r", "b"], ["both"], hidden_size=130, direction="bidirectional"),
        node("Transpose", ["both"], ["turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "join"], ["joined"]),
        node("GRU", ["joined", "gw", "gr", "gb"], ["y", "last"], hidden_size=9),
    ]
    weights = {"w": values(2, 520, 5) / 3, "r": values(2, 520, 130) / 12, "b": values(2, 1040) / 3}
    weights |= {"gw": values(1, 27, 260) / 12, "gr": values(1, 27, 9) / 3, "gb": values(1, 54) / 3}
    return model(nodes, {"x": [3, 2, 5]}, ["y", "last"], {**weights, "join": np.array([3, 2, 260])})


@pytest.mark.parametrize(
    ("given", "sizes", "kinds"),
    [
        (text_model(), [(9, 0), (1, 9), (1, 140)], {"Attention", "LayerNorm", "MatMul", "Softmax"}),
        (recurrent_model(), [(3, 2)], {"Recurrent"}),
    ],
    ids=["text", "recurrent"],
)
def test_models(given: ir.Model, sizes: list[tuple[int, int]], kinds: set[str]) -> None:
    working = lowered(given, [Prepare(), Kernels(machine=GPU)])
    assert kinds <= {node.op_type for node in working.graph if node.domain == DOMAIN}
    names = [str(value.name) for value in given.graph.inputs]
    imported = to_relax(working, GPU)
    machine = relax.VirtualMachine(build(imported.module, GPU), tvm.cuda())
    weights = [tvm.runtime.tensor(w.numpy(), tvm.cuda()) for w in imported.weights.values()]
    session = ort.InferenceSession(ir.to_proto(given).SerializeToString(), providers=["CPUExecutionProvider"])
    for new, past in sizes:
        shapes = {
            "x": (1, new, 24) if len(names) > 1 else (3, 2, 5),
            "past_k": (1, 3, past, 8),
            "past_v": (1, 3, past, 8),
        }
        feed = {name: values(*shapes[name]) for name in names}
        found = machine["main"](*(tvm.runtime.tensor(feed[name], tvm.cuda()) for name in names), *weights)
        for one, wanted in zip(found, session.run(None, feed), strict=True):
            np.testing.assert_allclose(one.numpy(), wanted, rtol=0, atol=2e-5)
