"""Images keep their channels last from one kernel to the next."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

tvm = pytest.importorskip("tvm")

from tvm_harness import Compiled, lowered, machines  # noqa: E402

from onnxcomp.model import name_nodes  # noqa: E402
from onnxcomp.targets.ort import reference_runner  # noqa: E402
from onnxcomp.targets.tvm.lower.convs import Convolutions  # noqa: E402
from onnxcomp.targets.tvm.lower.layouts import Layouts  # noqa: E402
from onnxcomp.targets.tvm.lower.pools import Pools  # noqa: E402

MACHINE = machines()[-1]
PASSES = [Convolutions(machine=MACHINE), Pools(), Layouts()]


def _graph(nodes, x, weights, outputs=("y",)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    name_nodes(model)
    return model


def _check(model, outputs=("y",), transposes=2):
    feed = {
        str(v.name): np.random.default_rng(0)
        .standard_normal([d if isinstance(d, int) else 2 for d in v.shape])
        .astype(np.float32)
        for v in model.graph.inputs
    }
    kinds = [node.op_type for node in lowered(model, PASSES).graph]
    assert kinds.count("Transpose") == transposes, kinds
    expected = reference_runner(model, list(outputs))(feed)
    for name, got in zip(outputs, Compiled(model, PASSES, MACHINE).run(feed), strict=True):
        np.testing.assert_allclose(got, expected[name], rtol=1e-4, atol=3e-6)
    return kinds


def _weights(**shapes):
    rng = np.random.default_rng(2)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def test_squeeze_and_excitation_stays_in_one_layout():
    model = _graph(
        [
            helper.make_node("Conv", ["x", "a"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["c"], ["p"]),
            helper.make_node("Conv", ["p", "d"], ["q"]),
            helper.make_node("Relu", ["q"], ["r"]),
            helper.make_node("Conv", ["r", "e"], ["s"]),
            helper.make_node("Sigmoid", ["s"], ["t"]),
            helper.make_node("Mul", ["c", "t"], ["m"]),
            helper.make_node("Conv", ["m", "f"], ["y"]),
        ],
        ["n", 3, 8, 6],
        _weights(a=(12, 3, 3, 3), d=(4, 12, 1, 1), e=(12, 4, 1, 1), f=(7, 12, 1, 1)),
    )
    _check(model)


def test_elementwise_nodes_work_with_channels_last():
    model = _graph(
        [
            helper.make_node("Conv", ["x", "a"], ["c"]),
            helper.make_node("Mul", ["c", "scale"], ["d"]),
            helper.make_node("Add", ["offset", "d"], ["e"]),
            helper.make_node("LeakyRelu", ["e"], ["f"], alpha=0.2),
            helper.make_node("Clip", ["f", "low", "high"], ["g"]),
            helper.make_node("Sub", ["g", "c"], ["h"]),
            helper.make_node("Conv", ["h", "b"], ["y"]),
        ],
        [2, 3, 8, 6],
        {
            **_weights(a=(12, 3, 1, 1), b=(5, 12, 3, 3), scale=(1, 12, 1, 1), offset=(12, 1, 1)),
            "low": np.float32(-0.5),
            "high": np.float32(0.8),
        },
    )
    _check(model)


def test_concat_split_pad_slice_and_reductions_get_their_axes_turned():
    model = _graph(
        [
            helper.make_node("Conv", ["x", "a"], ["c"]),
            helper.make_node("Split", ["c", "parts"], ["d", "e"], axis=1),
            helper.make_node("Concat", ["e", "d", "c"], ["f"], axis=-3),
            helper.make_node("Concat", ["f", "f"], ["g"], axis=2),
            helper.make_node("Pad", ["g", "pads"], ["h"]),
            helper.make_node("Slice", ["h", "starts", "ends", "axes"], ["i"]),
            helper.make_node("ReduceMean", ["i", "channel"], ["j"]),
            helper.make_node("Mul", ["i", "j"], ["k"]),
            helper.make_node("Conv", ["k", "b"], ["y"]),
        ],
        [2, 3, 8, 6],
        {
            **_weights(a=(12, 3, 1, 1), b=(5, 24, 3, 3)),
            "parts": np.array([4, 8]),
            "pads": np.array([0, 0, 1, 2, 0, 0, 3, 0]),
            "starts": np.array([1, 2]),
            "ends": np.array([100, 6]),
            "axes": np.array([2, -1]),
            "channel": np.array([1]),
        },
    )
    _check(model)


def test_a_value_that_is_read_in_both_layouts_is_turned_once_for_those_that_need_it():
    model = _graph(
        [
            helper.make_node("Conv", ["x", "a"], ["c"]),
            helper.make_node("Relu", ["c"], ["y"]),
            helper.make_node("Reshape", ["y", "shape"], ["z"]),
            helper.make_node("Conv", ["y", "b"], ["w"]),
        ],
        [2, 3, 8, 6],
        {**_weights(a=(12, 3, 1, 1), b=(5, 12, 3, 3)), "shape": np.array([2, -1])},
        outputs=("y", "z", "w"),
    )
    _check(model, outputs=("y", "z", "w"), transposes=3)


def test_a_transpose_that_moves_nothing_is_a_reshape():
    model = _graph(
        [
            helper.make_node("Conv", ["x", "a"], ["c"]),
            helper.make_node("GlobalMaxPool", ["c"], ["p"]),
            helper.make_node("Flatten", ["p"], ["y"]),
        ],
        ["n", 1, 8, 6],
        _weights(a=(12, 1, 3, 3)),
    )
    kinds = _check(model, transposes=0)
    assert kinds.count("Reshape") == 2


def test_transposes_of_the_model_merge_with_those_of_the_layout():
    model = _graph(
        [
            helper.make_node("Transpose", ["x"], ["a"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["a", "w"], ["b"]),
            helper.make_node("Transpose", ["b"], ["c"], perm=[0, 2, 3, 1]),
            helper.make_node("Softmax", ["c"], ["y"], axis=-1),
        ],
        [2, 8, 6, 3],
        _weights(w=(12, 3, 1, 1)),
    )
    _check(model, transposes=0)


def test_a_sequence_keeps_its_channels_last():
    model = _graph(
        [
            helper.make_node("Conv", ["x", "a"], ["c"], pads=[2, 2]),
            helper.make_node("Relu", ["c"], ["d"]),
            helper.make_node("MaxPool", ["d"], ["e"], kernel_shape=[2], strides=[2]),
            helper.make_node("Conv", ["e", "b"], ["y"]),
        ],
        ["n", 3, 20],
        _weights(a=(12, 3, 5), b=(5, 12, 1)),
    )
    _check(model)
