"""What is read from old and careless files is brought into one form; what makes no sense is refused when it is read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxcomp.api import rewrite
from onnxcomp.errors import GraphError
from onnxcomp.model import check_graph, infer_shapes, load, save
from onnxcomp.skeleton import merge_types, skeleton
from tests.corpus.harness import run_all, session

X = {"x": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)}


def old_model() -> onnx.ModelProto:
    """As written before 2019: IR version 3, every weight an input as well, an open size of -1."""
    weight = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "old",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 4]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [-1, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3)


def test_weights_of_an_old_file_are_no_inputs(tmp_path):
    path, result = tmp_path / "old.onnx", tmp_path / "new.onnx"
    onnx.save(old_model(), path)
    assert [v.name for v in load(path).graph.inputs] == ["x"]
    report = rewrite(path, result, recipe="int8", data=[X])
    assert any(e.action == "applied" and e.op_type == "MatMul" for e in report.passes[-1].edits)
    before, after = run_all(path, [X])[0][0], run_all(result, [X])[0][0]
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()
    assert [v.name for v in session(result).get_inputs()] == ["x"]


def test_size_of_minus_one_is_unknown(tmp_path):
    onnx.save(old_model(), tmp_path / "m.onnx")
    shape = load(tmp_path / "m.onnx").graph.inputs[0].shape
    assert shape is not None
    assert not isinstance(shape[0], int)


def test_long_name_of_the_default_domain(tmp_path):
    model = parser.parse_model('<ir_version: 8, opset_import: ["ai.onnx" : 17]> g (float[2] x) => (float[2] y) '
                               "{ a = ai.onnx.Neg(x) y = ai.onnx.Exp(a) }")  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    assert loaded.opset_imports == {"": 17}
    check_graph(loaded)


def test_nodes_of_a_subgraph_in_any_order(tmp_path):
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] p) { a = Neg(x) p = Exp(a) }, else_branch = e () => (float[2] q)
        { q = Abs(x) }> }""")
    body = next(a for a in model.graph.node[0].attribute if a.name == "then_branch").g
    nodes = list(body.node)
    del body.node[:]
    body.node.extend(nodes[::-1])
    onnx.save(model, tmp_path / "m.onnx")
    check_graph(load(tmp_path / "m.onnx"))


@pytest.mark.parametrize("where", ["node", "subgraph", "output", "function"])
def test_value_that_nobody_computes(where, tmp_path):
    body = {"subgraph": "p = Neg(ghost)"}.get(where, "p = Neg(x)")
    inner = "ghost" if where == "function" else "a"
    text = f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g (float[2] x, bool c) => (float[2] y) {{
        z = local.F({"ghost" if where == "node" else "x"})
        y = If (c) <then_branch = t () => (float[2] p) {{ {body} }}, else_branch = e () => (float[2] q)
        {{ q = Abs(z) }}> }}
        <domain: "local", opset_import: ["" : 17]> F (a) => (b) {{ b = Neg({inner}) }}"""
    model = parser.parse_model(text)
    if where == "output":
        model.graph.output[0].name = "ghost"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="'ghost'"):
        load(tmp_path / "m.onnx")


def test_name_that_is_no_text(tmp_path):
    data = old_model().SerializeToString().replace(b"Relu", b"\xff\xfe\xfd\xfc")
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(GraphError, match="not a valid ONNX model"):
        load(tmp_path / "m.onnx")


def test_producer_that_is_no_text(tmp_path):
    model = old_model()
    model.producer_name = "producer"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString().replace(b"producer", b"\xffroducer"))
    with pytest.raises(GraphError, match="cannot write"):
        save(load(tmp_path / "m.onnx"), tmp_path / "out.onnx")


def test_inferred_type_of_a_sequence(tmp_path):
    model = parser.parse_model('<ir_version: 8, opset_import: ["" : 12]> g (float[6] x, int64[3] k) => (int64 n) '
                               "{ s = SplitToSequence(x, k) n = SequenceLength(s) }")  # fmt: skip
    onnx.save(model, tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    infer_shapes(loaded)
    assert str(loaded.graph.node(0).outputs[0].type).startswith("Sequence")


def test_large_weights_of_one_name_in_two_branches():
    """In the skeleton they are inputs, each with its own shape."""
    branches = []
    for name, size in (("t", 2000), ("e", 3000)):
        weight = numpy_helper.from_array(np.ones(size, np.float32), "w")
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches.append(helper.make_graph([helper.make_node("Neg", ["w"], [name])], name, [], [output], [weight]))
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])  # fmt: skip

    found = skeleton(ir.from_proto(helper.make_model(graph)))
    shapes = {a.name: a.g.input[0].type.tensor_type.shape.dim[0].dim_value for a in found.graph.node[0].attribute}
    assert shapes == {"then_branch": 2000, "else_branch": 3000}
    assert not any(a.g.initializer for a in found.graph.node[0].attribute)


def test_constant_without_a_value(tmp_path):
    model = old_model()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["odd"], jalue=1.0))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="the Constant 'odd' has no value"):
        load(tmp_path / "m.onnx")


def test_body_written_twice_once_as_a_number(tmp_path):
    """A node of two attributes of one name, of which only one is a graph, does not stop type inference."""
    graph = parser.parse_graph(
        "g (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = t () => (float[2] r) { r = Abs (x) },"
        " else_branch = e () => (float[2] s) { s = Neg (x) }> }"
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    loaded = ir.from_proto(model)
    proto = skeleton(loaded)
    proto.graph.node[0].attribute.append(helper.make_attribute("then_branch", 1))
    merge_types(loaded.graph, proto.graph)
    assert [n.op_type for n in loaded.graph] == ["If"]
