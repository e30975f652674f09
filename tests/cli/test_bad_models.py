"""Bad models: each has a message of its own and exit code 2, shows no traceback, and leaves what is there as it was."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.mark.parametrize("verb", ["inspect", "rewrite", "compress", "compile", "profile", "compare"])
def test_every_verb_refuses_what_is_no_model(fails, tmp_path, model_path, data_path, verb):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"this is no protobuf at all")
    options = {
        "rewrite": ["-o", tmp_path / "out.onnx", "--data", data_path],
        "compress": ["-o", tmp_path / "out", "--data", data_path],
        "compile": ["-o", tmp_path / "out"],
        "compare": [model_path, "--data", data_path],
    }
    assert "bad.onnx is not a" in fails(verb, bad, *options.get(verb, []))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an ONNX model: it has no graph"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not an ONNX model"),
        (bytes(1000), "is not an ONNX model"),
    ],
)
def test_other_files(fails, tmp_path, content, message):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    assert message in fails("inspect", path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_truncated(fails, model_path, share):
    content = model_path.read_bytes()
    model_path.write_bytes(content[: int(len(content) * share)])
    assert "mlp.onnx is not a" in fails("inspect", model_path)


def test_missing(fails, tmp_path):
    assert "none.onnx: no such file" in fails("inspect", tmp_path / "none.onnx")
    assert "is not a file" in fails("inspect", tmp_path)


def test_external_data_missing(fails, external_path):
    (external_path.parent / "weights.bin").unlink()
    message = fails("compile", external_path, "-o", external_path.parent / "out")
    assert "the file 'weights.bin' with weight 'w1' is missing" in message


def test_external_data_truncated(fails, external_path):
    os.truncate(external_path.parent / "weights.bin", 1000)
    assert "the file 'weights.bin' with weight 'w1' is truncated" in fails("inspect", external_path)


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(bytes(1 << 16))
    return path


def point_to(path, location, **entries):
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            elif entry.key in entries:
                entry.value = entries[entry.key]
    onnx.save(model, path)


@pytest.mark.parametrize("kind", ["relative", "inner", "absolute", "symlink", "folder"])
def test_external_data_outside_the_folder(fails, external_path, secret, kind):
    folder = external_path.parent
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to(folder.parent)
    location = {
        "relative": "../secret",
        "inner": "x/../../secret",
        "absolute": str(secret),
        "symlink": "link",
        "folder": "up/secret",
    }[kind]
    point_to(external_path, location)
    message = fails("compile", external_path, "-o", folder / "out")
    assert f"the file {location!r} with weight 'w1' lies outside the model's folder" in message


def test_external_data_by_hard_link(fails, external_path, secret):
    (external_path.parent / "weights.bin").unlink()
    os.link(secret, external_path.parent / "weights.bin")
    assert "has several hard links" in fails("inspect", external_path)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        ("-8", "is not a valid ONNX model"),
        ("9000000000000000000", "with weight 'w1' is truncated"),
        ("x", "is not a valid ONNX model"),
    ],
)
def test_external_data_outside_the_file(fails, external_path, offset, message):
    point_to(external_path, "weights.bin", offset=offset)
    assert message in fails("inspect", external_path)


def test_a_symlink_inside_the_folder_is_fine(cli, external_path):
    data = external_path.parent / "weights.bin"
    data.rename(external_path.parent / "blob")
    data.symlink_to("blob")
    assert cli("inspect", external_path)[0] == 0


@pytest.mark.parametrize("dims", [[8, 33], [8, 31], [0], []])
def test_a_weight_without_the_data_of_its_shape(fails, tmp_path, mlp, dims):
    model = mlp()
    model.graph.initializer[0].dims[:] = dims
    onnx.save(model, tmp_path / "m.onnx")
    message = fails("rewrite", tmp_path / "m.onnx", "-o", tmp_path / "out.onnx", "--recipe", "cleanup")
    assert "m.onnx is not a valid ONNX model: tensor 'w1' cannot be read: its shape " in message
    assert "takes" in message
    assert "not 1024" in message


@pytest.mark.parametrize("in_a_node", [False, True])
def test_numbers_without_the_count_of_their_shape(fails, tmp_path, mlp, in_a_node):
    """As protobuf lists of floats, and not as bytes."""
    model = mlp()
    tensor = helper.make_tensor("b1", TensorProto.FLOAT, [32], np.ones(32))
    tensor.dims[:] = [4, 33]
    if in_a_node:
        del model.graph.initializer[1]
        model.graph.node.insert(0, helper.make_node("Constant", [], ["b1"], value=tensor))
    else:
        model.graph.initializer[1].CopyFrom(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    message = fails("inspect", tmp_path / "m.onnx")
    assert "m.onnx is not a valid ONNX model: tensor 'b1' cannot be read: cannot reshape" in message


def test_tensors_of_every_type_are_read(cli, tmp_path):
    """Three elements of 4 bits take two bytes, complex numbers two floats, and texts have no size."""
    kinds = [getattr(TensorProto, name) for name in ("INT4", "BFLOAT16", "BOOL", "COMPLEX64", "FLOAT8E4M3FN", "DOUBLE")]
    tensors = [helper.make_tensor(f"t{kind}", kind, [3], np.ones(3)) for kind in kinds]
    raw = [
        helper.make_tensor("raw4", TensorProto.UINT4, [3], b"\x21\x03", raw=True),
        numpy_helper.from_array(np.ones(3)),
    ]
    raw[1].name = "raw8"
    texts = helper.make_tensor("texts", TensorProto.STRING, [3], [b"a", b"bc", b""])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "types",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [y],
        [*tensors, *raw, texts],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert cli("inspect", tmp_path / "m.onnx")[0] == 0


def test_a_model_that_cannot_run(fails, tmp_path, mlp):
    model = mlp()
    model.graph.node[1].op_type = "NoSuchOp"
    onnx.save(model, tmp_path / "m.onnx")
    assert "NoSuchOp" in fails("compile", tmp_path / "m.onnx", "-o", tmp_path / "out")


def test_a_name_with_terminal_escapes(cli, tmp_path, mlp):
    model = mlp()
    model.graph.node[1].op_type = "\x1b[31mRed\n"
    model.graph.node[1].name = "\x1b]0;title\x07"
    onnx.save(model, tmp_path / "m.onnx")
    for verb in (["inspect", "--select", "name=*"], ["compile", "-o", tmp_path / "out"]):
        _, out, err = cli(verb[0], tmp_path / "m.onnx", *verb[1:])
        assert "\x1b" not in out + err
