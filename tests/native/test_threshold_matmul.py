"""The native ThresholdMatMul, its function body in stock ONNX Runtime, and the numpy reference: all three agree."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp import native
from onnxcomp.errors import GraphError
from onnxcomp.ops import DOMAIN, MIN_OPSET, OPS, VERSION, threshold_matmul

ort = pytest.importorskip("onnxruntime")

needs_library = pytest.mark.skipif(
    not native.available(),
    reason="the native library was not built (no C++ compiler, or ONNXCOMP_NO_NATIVE was set when installing)",
)

Array = np.ndarray[Any, np.dtype[Any]]


def _model(
    domain: str, k: int, n: int, *, x_shape: list[str | int] | None = None, threshold_shape: tuple[int, ...] = ()
) -> ir.Model:
    def value(name: str, shape: list[str | int] | tuple[int, ...] | None) -> ir.Value:
        return ir.Value(
            name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=None if shape is None else ir.Shape(shape)
        )

    x = value("X", ["batch", k] if x_shape is None else x_shape)
    w, t = value("W", (k, n)), value("threshold", threshold_shape)
    node = ir.node("ThresholdMatMul", [x, w, t], domain=domain, name="product")
    node.outputs[0].name = "Y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x, w, t], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    if domain == DOMAIN:
        OPS["ThresholdMatMul"].install(model)
    else:
        model.opset_imports[domain] = 1
    return model


def _options(threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return options


def _session(model: ir.Model, *, threads: int = 1, register: int = 0) -> Any:
    options = _options(threads)
    for _ in range(register):
        options.register_custom_ops_library(str(native.library_path()))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _inputs(rng: np.random.Generator, batch: int, k: int, n: int) -> tuple[Array, Array]:
    return rng.standard_normal((batch, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)


def _run(session: Any, x: Array, w: Array, threshold: Array | float) -> Array:
    (y,) = session.run(None, {"X": x, "W": w, "threshold": np.asarray(threshold, np.float32)})
    return np.asarray(y)


def _assert_close(actual: Array, x: Array, w: Array, threshold: Array | float) -> None:
    """Against the reference in double precision; the bound is that of a sum of K products in single precision."""
    expected = threshold_matmul(x.astype(np.float64), w.astype(np.float64), np.asarray(threshold, np.float64))
    bound = np.abs(x).astype(np.float64) @ np.abs(w) * np.finfo(np.float32).eps * 8 + 1e-30
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= bound)


# 1, 3 and 4 rows a pass; columns below, at and above a cache line and a block, with and without a rest.
SIZES = [(1, 1), (3, 5), (4, 16), (5, 17), (7, 1), (64, 33), (130, 2048), (131, 2049), (96, 4111), (1000, 4), (67, 576)]


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_kernel_equals_reference(k: int, n: int, threads: int) -> None:
    rng = np.random.default_rng(k * 10007 + n)
    session = _session(_model(native.DOMAIN, k, n), threads=threads, register=1)
    for batch in (1, 3):
        x, w = _inputs(rng, batch, k, n)
        for threshold in (0.0, 0.5, 1.5):
            _assert_close(_run(session, x, w, threshold), x, w, threshold)


@needs_library
def test_kernel_per_element_threshold() -> None:
    rng = np.random.default_rng(0)
    x, w = _inputs(rng, 2, 67, 40)
    threshold = np.abs(rng.standard_normal(67)).astype(np.float32)
    session = _session(_model(native.DOMAIN, 67, 40, threshold_shape=(67,)), register=1)
    _assert_close(_run(session, x, w, threshold), x, w, threshold)


@needs_library
@pytest.mark.parametrize("shape", [(67,), (1, 1, 67), (2, 3, 67), (0, 67)])
def test_kernel_takes_any_rank(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape).astype(np.float32)
    w = rng.standard_normal((67, 9)).astype(np.float32)
    session = _session(_model(native.DOMAIN, 67, 9, x_shape=[*shape]), register=1)
    _assert_close(_run(session, x, w, 0.5), x, w, 0.5)


@needs_library
@pytest.mark.parametrize("k", [1, 6, 40])
def test_kernel_all_dropped_is_exactly_zero(k: int) -> None:
    x, w = _inputs(np.random.default_rng(2), 2, k, 35)
    session = _session(_model(native.DOMAIN, k, 35), register=1)
    np.testing.assert_array_equal(_run(session, x, w, np.inf), np.zeros((2, 35), np.float32))
    np.testing.assert_array_equal(_run(session, np.zeros_like(x), w, 0.0), np.zeros((2, 35), np.float32))


@needs_library
def test_kernel_negative_threshold_keeps_all() -> None:
    x, w = _inputs(np.random.default_rng(3), 1, 50, 35)
    x[0, ::2] = 0
    session = _session(_model(native.DOMAIN, 50, 35), register=1)
    _assert_close(_run(session, x, w, -1.0), x, w, -1.0)


@needs_library
def test_kernel_boundary_is_dropped() -> None:
    x = np.array([[0.5, -0.5, np.nextafter(np.float32(0.5), np.float32(1))]], np.float32)
    w = np.array([[1], [10], [100]], np.float32)
    session = _session(_model(native.DOMAIN, 3, 1), register=1)
    np.testing.assert_allclose(_run(session, x, w, 0.5), [[50.0]], rtol=1e-6)


@pytest.mark.parametrize("domain", [pytest.param(native.DOMAIN, marks=needs_library), DOMAIN])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3, 8])
def test_nan_and_infinity_reach_the_output(domain: str, special: float, place: int) -> None:
    x, w = _inputs(np.random.default_rng(4), 2, 9, 21)
    x[1, place] = special
    session = _session(_model(domain, 9, 21), register=int(domain == native.DOMAIN))
    y = _run(session, x, w, 0.5)
    _assert_close(y[:1], x[:1], w, 0.5)
    np.testing.assert_array_equal(y[1], np.full(21, np.nan) if np.isnan(special) else np.sign(w[place]) * special)


@needs_library
def test_kernel_nan_threshold_keeps_all() -> None:
    x, w = _inputs(np.random.default_rng(5), 1, 9, 21)
    session = _session(_model(native.DOMAIN, 9, 21), register=1)
    np.testing.assert_allclose(_run(session, x, w, np.nan), x @ w, rtol=1e-5, atol=1e-5)


@needs_library
def test_kernel_does_not_read_dropped_rows() -> None:
    x, w = _inputs(np.random.default_rng(6), 1, 12, 8)
    x[0, 5] = 0.0
    clean = w.copy()
    clean[5] = 0.0
    w[5] = np.nan
    session = _session(_model(native.DOMAIN, 12, 8), register=1)
    _assert_close(_run(session, x, w, 0.1), x, clean, 0.1)


@pytest.mark.parametrize("threshold_shape", [(), (1,), (67,)])
@pytest.mark.parametrize("shape", [(67,), (1, 67), (2, 3, 67)])
def test_body_in_stock_runtime_equals_reference(shape: tuple[int, ...], threshold_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal(shape).astype(np.float32)
    w = rng.standard_normal((67, 40)).astype(np.float32)
    threshold = np.abs(rng.standard_normal(threshold_shape)).astype(np.float32)
    model = _model(DOMAIN, 67, 40, x_shape=[*shape], threshold_shape=threshold_shape)
    model.graph.outputs[0].shape = ir.Shape([*shape[:-1], 40])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    _assert_close(_run(_session(model), x, w, threshold), x, w, threshold)


def test_body_keeps_the_element_type() -> None:
    model = _model(DOMAIN, 8, 4)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((2, 8)).astype(np.float16), rng.standard_normal((8, 4)).astype(np.float16)
    (y,) = _session(model).run(None, {"X": x, "W": w, "threshold": np.asarray(0.5, np.float16)})
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, threshold_matmul(x, w, 0.5), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("opset", [MIN_OPSET, 18, 21, 23])
def test_install_takes_the_opset_of_the_model_and_is_idempotent(opset: int) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": opset}), ir_version=10)
    OPS["ThresholdMatMul"].install(model)
    first = model.functions[DOMAIN, "ThresholdMatMul", ""]
    OPS["ThresholdMatMul"].install(model)
    assert list(model.functions.values()) == [first]
    assert first.opset_imports[""] == opset
    assert model.opset_imports[DOMAIN] == VERSION


def test_install_refuses_old_and_unknown_versions() -> None:
    old = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": MIN_OPSET - 1}), ir_version=8)
    with pytest.raises(GraphError, match="needs opset 16"):
        OPS["ThresholdMatMul"].install(old)
    newer = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20, DOMAIN: VERSION + 1}), ir_version=10)
    with pytest.raises(GraphError, match="version 2 of the ops"):
        OPS["ThresholdMatMul"].install(newer)


@needs_library
def test_output_shape_is_inferred_with_symbols(tmp_path: Path) -> None:
    model = _model(native.DOMAIN, 8, 4, x_shape=["batch", 5, 8])
    options = _options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.register_custom_ops_library(str(native.library_path()))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == ["batch", 5, 4]


@needs_library
@pytest.mark.parametrize("times", [1, 2, 3])
def test_registering_again_is_harmless(times: int) -> None:
    x, w = _inputs(np.random.default_rng(9), 1, 8, 4)
    session = _session(_model(native.DOMAIN, 8, 4), register=times)
    _assert_close(_run(session, x, w, 0.5), x, w, 0.5)


def test_without_the_library_the_session_does_not_load() -> None:
    with pytest.raises(Exception, match=r"onnxcomp\.native"):
        _session(_model(native.DOMAIN, 8, 4))


@needs_library
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "t_shape", "message"),
    [
        ((1, 7), (8, 4), (), "last axis of X"),
        ((1, 8), (2, 8, 4), (), "two axes"),
        ((1, 8), (8, 4), (3,), "threshold has to be"),
        ((1, 8), (8, 4), (2, 4), "threshold has to be"),
    ],
)
def test_kernel_refuses_wrong_shapes(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], t_shape: tuple[int, ...], message: str
) -> None:
    model = _model(native.DOMAIN, 8, 4)
    for value in model.graph.inputs:
        value.shape = None
    session = _session(model, register=1)
    with pytest.raises(Exception, match=message):
        _run(session, np.ones(x_shape, np.float32), np.ones(w_shape, np.float32), np.zeros(t_shape, np.float32))


@needs_library
def test_one_session_runs_in_several_threads_at_once() -> None:
    session = _session(_model(native.DOMAIN, 300, 4100), threads=2, register=1)
    rng = np.random.default_rng(10)
    w = rng.standard_normal((300, 4100)).astype(np.float32)
    xs = [rng.standard_normal((1, 300)).astype(np.float32) for _ in range(4)]
    results: dict[int, list[Array]] = {}

    def work(index: int) -> None:
        results[index] = [_run(session, xs[index], w, 0.5) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(xs):
        assert len(results[index]) == 5
        for y in results[index]:
            _assert_close(y, x, w, 0.5)


@needs_library
def test_loading_leaves_denormals_alone() -> None:
    """Libraries linked with -ffast-math switch the whole process to flush-to-zero on load."""
    _session(_model(native.DOMAIN, 8, 4), register=1)
    smallest = np.array([np.finfo(np.float32).tiny], np.float32)
    assert (smallest / np.float32(2))[0] > 0
