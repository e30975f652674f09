"""Conversion to a newer opset keeps what the model computes, or is refused with a reason."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from onnxcomp.errors import GraphError
from onnxcomp.model import load, save
from onnxcomp.opset import opset, raise_opset
from tests.corpus.harness import run_all

X = np.random.default_rng(0).normal(size=(1, 1, 5, 7)).astype(np.float32)


def text(version: int, body: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {version}]> g {body}')


@pytest.fixture
def converted(tmp_path):
    """Converts a model and checks that its outputs are the same to 1e-6."""

    def run(proto: onnx.ModelProto, version: int, feed: dict[str, np.ndarray]) -> ir.Model:
        path, result = tmp_path / "old.onnx", tmp_path / "new.onnx"
        onnx.save(proto, path)
        model = load(path)
        assert raise_opset(model, version)
        assert opset(model) == version
        save(model, result)
        for before, after in zip(run_all(path, [feed])[0], run_all(result, [feed])[0], strict=True):
            np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
        return model

    return run


@pytest.mark.parametrize("version", [13, 17, 21])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("op", "scales"),
    [
        *itertools.product(["Upsample 7", "Upsample 9", "Resize 10"], ["1.0, 1.0, 2.0, 2.0", "1.0, 1.0, 2.5, 1.3"]),
        ("Resize 10", "1.0, 1.0, 0.6, 0.5"),
    ],
)
def test_resampling(op, scales, mode, version, converted):
    name, old = op.split()
    attributes = f'mode = "{mode}"' + (f", scales = [{scales}]" if old == "7" else "")
    weights, inputs = ("", "x") if old == "7" else (f"<float[4] s = {{{scales}}}>", "x, s")
    body = f"(float[1, 1, 5, 7] x) => (float[a, b, c, d] y) {weights} {{ y = {name} <{attributes}> ({inputs}) }}"
    converted(text(int(old), body), version, {"x": X})


def test_resampling_in_two_ways_at_once_is_refused(tmp_path):
    body = "(float[1, 1, 5, 7] x) => (float[a, b, c, d] y) <float[4] s = {1, 1, 2, 0.5}> { y = Resize(x, s) }"
    onnx.save(text(10, body), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="shrinks along another"):
        raise_opset(load(tmp_path / "m.onnx"), 13)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_softmax_over_several_axes(op, axis, converted):
    body = f"(float[1, n, 5, 7] x) => (float[1, n, 5, 7] y) {{ z = Abs(x) y = {op} <axis = {axis}> (z) }}"
    converted(text(11, body), 17, {"x": X})


@pytest.mark.parametrize(("axis", "fine"), [(1, False), (3, True), (-1, True)])
def test_hardmax_over_several_axes_is_refused(axis, fine, converted):
    proto = text(11, f"(float[1, 1, 5, 7] x) => (float[1, 1, 5, 7] y) {{ y = Hardmax <axis = {axis}> (x) }}")
    if fine:
        converted(proto, 13, {"x": X})
    else:
        with pytest.raises(GraphError, match="Hardmax over several axes"):
            converted(proto, 13, {"x": X})


def test_scan_over_a_batch_is_refused(tmp_path):
    body = """(float[1, 3, 2] x, float[1, 2] i) => (float[1, 2] y, float[1, 3, 2] z) {
        y, z = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] n) => (float[2] t, float[2] o)
            { t = Add(s, n) o = Identity(t) }> ("", i, x) }"""
    onnx.save(text(8, body), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="Scan over a batch"):
        raise_opset(load(tmp_path / "m.onnx"), 13)


def test_model_without_ops_of_the_default_domain(tmp_path):
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["ai.onnx.ml" : 3]> g (float[1, 3] x) => (float[1, 3] y) '
        "{ y = ai.onnx.ml.Scaler <offset = [1.0], scale = [2.0]> (x) }"
    )
    onnx.save(proto, tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    assert raise_opset(model, 13)
    assert model.opset_imports == {"ai.onnx.ml": 3, "": 13}


def test_weights_on_disk_in_a_subgraph_keep_their_place(tmp_path):
    body = """(float[8] x, bool c) => (float[8] y) { y = If (c) <
        then_branch = t () => (float[8] p) <float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}> { p = Mul(x, w) },
        else_branch = e () => (float[8] q) { q = Neg(x) }> }"""
    path, result = tmp_path / "m.onnx", tmp_path / "r.onnx"
    onnx.save(text(9, body), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    model = load(path)
    raise_opset(model, 13)
    save(model, result)
    feed = {"x": np.arange(8, dtype=np.float32), "c": np.array(True)}
    np.testing.assert_array_equal(run_all(result, [feed])[0][0], np.arange(8) * np.arange(1, 9))


def test_names_stay_apart_in_subgraphs(tmp_path):
    """The converter adds constants, whose names must not clash with those that it adds elsewhere."""
    body = """
        a = Clip <max = 1.0> (x)
        y = If (c) <then_branch = t () => (float[2] r) { p = Neg (a)  q = Neg (p)  r = Dropout <ratio = 0.5> (q) },
                    else_branch = e () => (float[2] s) { s = Clip <min = 0.5> (a) }>
    """
    model = parser.parse_model(
        f'<ir_version: 7, opset_import: ["": 9]> g (bool c, float[2] x) => (float[2] y) {{ {body} }}'
    )
    onnx.save(model, tmp_path / "m.onnx")
    found = load(tmp_path / "m.onnx")
    assert raise_opset(found, 13)
    names = {v.name for node in found.graph for v in node.outputs}
    assert not names & {v.name for body in found.graph.subgraphs() for node in body for v in node.outputs}
    save(found, tmp_path / "n.onnx")
    feeds = [{"c": np.array(c), "x": np.array([0.25, 2.0], np.float32)} for c in (True, False)]
    then, other = run_all(tmp_path / "n.onnx", feeds)
    np.testing.assert_array_equal(then[0], [0.25, 1.0])
    np.testing.assert_array_equal(other[0], [0.5, 1.0])
