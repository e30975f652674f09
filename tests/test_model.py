"""Loading, saving, measuring models."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp import model as model_module
from onnxcomp.errors import GraphError
from onnxcomp.model import check_graph, fix_shapes, infer_shapes, load, model_size, name_nodes, save
from onnxcomp.specs import input_specs


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_load_names_nodes_uniquely(tmp_path, mlp):
    proto = mlp()
    for node, name in zip(proto.graph.node, ("", "same", "same"), strict=True):
        node.name = name
    onnx.save(proto, tmp_path / "m.onnx")
    names = [n.name for n in load(tmp_path / "m.onnx").graph]
    assert names == ["Gemm_0", "same", "same_0"]


def test_load_sorts_nodes(tmp_path, mlp):
    proto = mlp()
    order = [n.op_type for n in proto.graph.node]
    nodes = list(reversed(proto.graph.node))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert [n.op_type for n in load(tmp_path / "m.onnx").graph] == order


def test_load_refuses_a_cycle(tmp_path, mlp):
    proto = mlp()
    proto.graph.node[0].input[0] = proto.graph.node[-1].output[0]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match="cycle"):
        load(tmp_path / "m.onnx")


def test_name_nodes_avoids_names_that_are_taken(mlp):
    proto = mlp()
    for node, name in zip(proto.graph.node, ("Gemm_0", "r", ""), strict=True):
        node.name = name
    model = ir.from_proto(proto)
    name_nodes(model)
    assert [n.name for n in model.graph] == ["Gemm_0", "r", "Gemm_1"]


def test_size(model_path, external_path):
    size = model_size(load(model_path))
    assert size.nodes == 3
    assert size.ops == {"Gemm": 2, "Relu": 1}
    assert size.parameters == 8 * 32 + 32 + 32 * 4 + 4
    assert size.weight_bytes == 4 * size.parameters
    assert size.macs == 0  # the batch is open
    assert model_size(load(external_path)) == size


def test_fixed_shapes_make_macs_known(model_path):
    model = load(model_path)
    fix_shapes(model, {"x": (2, 8)})
    assert model_size(model).macs == 2 * (8 * 32 + 32 * 4)
    assert list(model.graph.outputs[0].shape) == [2, 4]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1, 8)}, r"no input 'z'; it has \['x'\]"),
        ({"x": (1, 8, 1)}, "'x' has 2 dimensions, not 3"),
        ({"x": (1, 9)}, "fixed dimension 8 on axis 1, not 9"),
    ],
)
def test_shapes_that_do_not_fit(model_path, shapes, message):
    with pytest.raises(GraphError, match=message):
        fix_shapes(load(model_path), shapes)


def test_infer_shapes_never_fails(mlp):
    proto = mlp()
    proto.graph.node[1].op_type = "NoSuchOp"
    infer_shapes(ir.from_proto(proto))


def test_check_graph_finds_an_unknown_op(mlp):
    proto = mlp()
    check_graph(ir.from_proto(proto))
    proto.graph.node[1].op_type = "NoSuchOp"
    with pytest.raises(GraphError, match="NoSuchOp"):
        check_graph(ir.from_proto(proto))


def test_check_graph_leaves_large_weights_alone(mlp):
    model = ir.from_proto(mlp(hidden=1000))
    before = {n: v.const_value for n, v in model.graph.initializers.items()}
    check_graph(model)
    assert {n: v.const_value for n, v in model.graph.initializers.items()} == before


def test_input_specs_leave_out_defaults_and_state(mlp):
    proto = mlp()
    proto.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [8, 32]))
    proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, [1]))
    helper.set_model_props(
        proto, {"onnxcomp.state": '[{"input": "s", "output": "y", "shape": [1], "dtype": "float32"}]'}
    )
    (spec,) = input_specs(ir.from_proto(proto))
    assert (spec.name, spec.dtype, spec.shape) == ("x", np.float32, ("batch", 8))


def test_minus_one_is_an_open_dimension(mlp):
    model = ir.from_proto(mlp(batch=-1))
    assert input_specs(model)[0].shape == (None, 8)
    fix_shapes(model, {"x": (3, 8)})
    assert input_specs(model)[0].shape == (3, 8)


def test_save_and_load(tmp_path, model_path, run, x):
    save(load(model_path), tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", {"x": x})[0], run(model_path, {"x": x})[0])
    assert files(tmp_path) == ["mlp.onnx", "out.onnx"]


def test_small_external_weights_go_into_the_file(tmp_path, external_path, run, x):
    """Written as they are, they would point to a file that is not beside the new one."""
    model = load(external_path)
    save(model, tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", {"x": x})[0], run(external_path, {"x": x})[0])
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())


def test_weights_on_disk_that_somebody_looks_at(tmp_path, external_path, run, x):
    """A folder of constants makes views of them, for one that is reshaped."""
    model = load(external_path)
    views = [v.const_value.numpy() for v in model.graph.initializers.values()]
    before = [view.copy() for view in views]
    save(model, tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", {"x": x})[0], run(external_path, {"x": x})[0])
    for view, expected in zip(views, before, strict=True):
        np.testing.assert_array_equal(view, expected)


def test_map_outputs_are_refused_with_advice(tmp_path):
    value = onnx.ValueInfoProto(name="y")
    value.type.map_type.key_type = TensorProto.INT64
    value.type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])
    graph = helper.make_graph([helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml")], "g", [x], [value])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(GraphError, match="zipmap"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("same", [True, False])
def test_large_weights_go_beside_the_file(tmp_path, monkeypatch, external_path, run, x, same):
    monkeypatch.setattr(model_module, "EXTERNAL_THRESHOLD", 1000)
    expected = run(external_path, {"x": x})[0]
    out = external_path if same else tmp_path / "out" / "m.onnx"
    out.parent.mkdir(exist_ok=True)
    save(load(external_path), out)
    np.testing.assert_array_equal(run(out, {"x": x})[0], expected)
    rest = ["weights.bin"] if same else []  # it may serve other models
    assert files(out.parent) == sorted([out.name, f"{out.name}.data", *rest])


def test_saving_again_over_itself(tmp_path, monkeypatch, model_path, run, x):
    """The weights are read from the very file that is replaced."""
    monkeypatch.setattr(model_module, "EXTERNAL_THRESHOLD", 1000)
    expected = run(model_path, {"x": x})[0]
    names = []
    for _ in range(3):
        save(load(model_path), model_path)
        np.testing.assert_array_equal(run(model_path, {"x": x})[0], expected)
        names.append(files(tmp_path))
    first, second = ["mlp.onnx", "mlp.onnx.data"], ["mlp.onnx", "mlp.onnx.1.data"]
    assert names == [first, sorted(second), first]


@pytest.mark.parametrize(("external", "step"), [(False, 0), (True, 0), (True, 1)])
def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch, model_path, run, x, external, step):
    if external:
        monkeypatch.setattr(model_module, "EXTERNAL_THRESHOLD", 1000)
        save(load(model_path), model_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > step and Path(target).parent == tmp_path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    model = load(model_path)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(GraphError, match=r"cannot write .*mlp.onnx: No space left"):
        save(model, model_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_constants_outside_the_file_are_kept(tmp_path, run):
    """No writer of onnx_ir moves the tensor of a Constant node along."""
    value = numpy_helper.from_array(np.arange(300, dtype=np.float32), "c")
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Add", ["x", "c"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [300])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [300])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "in").mkdir()
    onnx.save(proto, tmp_path / "in" / "m.onnx", save_as_external_data=True, size_threshold=0, convert_attribute=True)
    save(load(tmp_path / "in" / "m.onnx"), tmp_path / "m.onnx")
    feed = {"x": np.ones(300, np.float32)}
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", feed)[0], np.arange(300) + 1)
    next((tmp_path / "in").glob("*[!x]")).unlink()
    with pytest.raises(GraphError, match="is missing"):
        load(tmp_path / "in" / "m.onnx")


def test_save_where_there_is_no_folder(tmp_path, model_path):
    with pytest.raises(GraphError, match="there is no folder"):
        save(load(model_path), tmp_path / "none" / "m.onnx")


def test_input_of_a_type_that_no_array_has(model_path):
    model = load(model_path)
    model.graph.inputs[0].dtype = ir.DataType.UNDEFINED
    with pytest.raises(GraphError, match="has the element type UNDEFINED, which no array has"):
        input_specs(model)
