"""What is refused, with the node's name and what to do, before TVM is imported."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import UnsupportedError
from onnxcomp.targets.tvm import TvmCpu
from onnxcomp.targets.tvm.supported import IMPORTED, require_supported

FLOAT = TensorProto.FLOAT


def model(nodes: list[onnx.NodeProto], shape: list[int], weights: tuple[onnx.TensorProto, ...] = ()) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        list(weights),
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def lstm_in_a_loop() -> ir.Model:
    body = helper.make_graph(
        [
            helper.make_node("LSTM", ["state", "w", "r"], ["", "last"], name="cell", hidden_size=2),
            helper.make_node("Identity", ["go"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [1, 1, 2]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("last", FLOAT, [1, 1, 2]),
        ],
    )
    weights = (
        numpy_helper.from_array(np.array(4, np.int64), "times"),
        numpy_helper.from_array(np.array(True), "on"),
        numpy_helper.from_array(np.zeros((1, 8, 2), np.float32), "w"),
        numpy_helper.from_array(np.zeros((1, 8, 2), np.float32), "r"),
    )
    return model([helper.make_node("Loop", ["times", "on", "x"], ["y"], name="steps", body=body)], [1, 1, 2], weights)


def attention() -> ir.Model:
    return model([helper.make_node("Attention", ["x", "x", "x"], ["y"], name="attend")], [1, 2, 4, 8])


def blocked_int4() -> ir.Model:
    weights = (
        helper.make_tensor("w", TensorProto.INT4, [32, 4], [0] * 128),
        numpy_helper.from_array(np.ones((2, 4), np.float32), "scale"),
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["wf"], name="blocks", axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "wf"], ["y"], name="product"),
    ]
    return model(nodes, [1, 32], weights)


@pytest.mark.parametrize(
    ("make", "node", "advice"),
    [
        (lstm_in_a_loop, "'steps'", "export the body and loop in the program"),
        (lstm_in_a_loop, "'cell'", "export one time step"),
        (attention, "'attend'", "opset 22 or older"),
        (blocked_int4, "'blocks'", "quantize per channel"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_node_and_what_to_do(make, node, advice):
    with pytest.raises(UnsupportedError, match=f"node {node}.*{advice}"):
        require_supported(make())


def test_refusals_are_those_of_the_target_and_do_not_import_tvm():
    code = (
        "import sys; sys.path.insert(0, 'tests/targets/tvm')\n"
        "import test_supported as t\n"
        "from onnxcomp.verbs.resolve import lowered\n"
        "from onnxcomp.errors import UnsupportedError\n"
        "for make in (t.lstm_in_a_loop, t.attention, t.blocked_int4):\n"
        "    try: lowered(make(), t.TvmCpu())\n"
        "    except UnsupportedError: pass\n"
        "    else: raise SystemExit('compiled')\n"
        "raise SystemExit('tvm' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_are_looked_into_once_and_named():
    function = ir.from_proto(
        helper.make_function("f", "Twice", ["a"], ["b"], [helper.make_node("Det", ["a"], ["b"], name="inner")],
                             [helper.make_opsetid("", 23)])
    )  # fmt: skip
    nodes = [helper.make_node("Twice", ["x"], ["m"], domain="f"), helper.make_node("Twice", ["m"], ["y"], domain="f")]
    made = model(nodes, [2, 2])
    made.functions[function.identifier()] = function
    made.opset_imports["f"] = 1
    with pytest.raises(UnsupportedError, match=r"node 'inner' in function 'Twice': there is no Det.*ort-cpu instead$"):
        require_supported(made)
    require_supported(made, frozenset({"Det"}))


def test_many_problems_are_counted():
    nodes = [helper.make_node("Det", ["x"], [f"y{i}" if i else "y"], name=f"d{i}") for i in range(5)]
    with pytest.raises(UnsupportedError, match=r"'d0'.*'d1'.*'d2'.*\(and 2 more\)$"):
        require_supported(model(nodes, [2, 2]))


def test_all_that_is_said_to_be_imported_has_a_converter():
    onnx_frontend = pytest.importorskip("tvm.relax.frontend.onnx.onnx_frontend")
    assert IMPORTED - {"If"} <= set(onnx_frontend._get_convert_map())


def test_a_model_of_a_newer_opset_is_refused():
    made = model([helper.make_node("Relu", ["x"], ["y"])], [2])
    made.opset_imports[""] = 24
    with pytest.raises(UnsupportedError, match=r"opset 24.*up to 23"):
        TvmCpu().lowering()[0].apply(made, None)
