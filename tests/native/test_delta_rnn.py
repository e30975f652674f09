"""Products accumulated from changes: DeltaMatMul, and the steps of a DeltaGRU and a DeltaLSTM, native.

Against references in numpy, and with nothing held back against onnxruntime's own ops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcomp import native

ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.skipif(
    not native.available(),
    reason="the native library was not built (no C++ compiler, or ONNXCOMP_NO_NATIVE was set when installing)",
)

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = dict[str, Array]

FLOAT = onnx.TensorProto.FLOAT
INPUTS = {
    "DeltaMatMul": ["X", "last", "sum", "threshold", "step"],
    "DeltaGRU": ["X", "H", "x_last", "h_last", "m_x", "m_h", "x_threshold", "h_threshold"],
    "DeltaLSTM": ["X", "H", "C", "x_last", "h_last", "m", "x_threshold", "h_threshold"],
}
WEIGHTS = {"DeltaMatMul": ["W"], "DeltaGRU": ["W", "R"], "DeltaLSTM": ["W", "R"]}
BIASES: dict[str, list[str]] = {"DeltaMatMul": [], "DeltaGRU": ["bias_x", "bias_h"], "DeltaLSTM": ["bias"]}
# The state that each output follows.
STATES = {
    "DeltaMatMul": ["sum", "last"],
    "DeltaGRU": ["H", "x_last", "h_last", "m_x", "m_h"],
    "DeltaLSTM": ["H", "C", "x_last", "h_last", "m"],
}
GATES = {"DeltaGRU": 3, "DeltaLSTM": 4}


def _int8(w: Array) -> tuple[Array, Array]:
    scale = np.maximum(np.abs(w).max(axis=0, initial=0), 1e-9) / 127
    return np.rint(w / scale).astype(np.int8), scale.astype(np.float32)


def _session(
    op: str,
    weights: Mapping[str, Array],
    *,
    int8: bool = False,
    threads: int = 1,
    shapes: Mapping[str, Sequence[str | int]] | None = None,
    path: str = "",
) -> Any:
    """`weights` with two axes become int8 with scales if `int8`; those that it lacks are inputs."""
    given = {}
    names = list(INPUTS[op])
    for name in WEIGHTS[op] + BIASES[op]:
        names += [name, f"{name}_scale"] if int8 and name in WEIGHTS[op] else [name]
    for name, array in weights.items():
        if int8 and name in WEIGHTS[op]:
            given[name], given[f"{name}_scale"] = _int8(array)
        else:
            given[name] = array
    inputs = [
        helper.make_tensor_value_info(name, FLOAT, (shapes or {}).get(name)) for name in names if name not in given
    ]
    outputs = [helper.make_tensor_value_info(f"{name}_out", FLOAT, None) for name in STATES[op]]
    node = helper.make_node(op + "Int8" * int8, names, [o.name for o in outputs], domain=native.DOMAIN)
    constants = [numpy_helper.from_array(array, name) for name, array in given.items()]
    graph = helper.make_graph([node], "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(native.DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if path:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = path
    options.register_custom_ops_library(str(native.library_path()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _dense(w: Array, *, int8: bool) -> Array:
    if not int8:
        return w.astype(np.float64)
    integers, scale = _int8(w)
    return integers.astype(np.float64) * scale


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def _send(x: Array, last: Array, threshold: Array) -> tuple[Array, Array]:
    """What is added to the input that the weights have seen, and that input."""
    with np.errstate(invalid="ignore"):
        d = x - last
        sent = ~(np.abs(d) <= threshold)
    return np.where(sent, d, np.float32(0)), np.where(sent, x, last)


def _sums(x: Array, last: Array, sums: Array, threshold: Array, w: Array) -> tuple[Array, Array]:
    d, new = _send(x, last, threshold)
    with np.errstate(invalid="ignore"):
        y = sums + d.astype(np.float64) @ w
        afresh = ~(np.isfinite(x - last).all(-1, keepdims=True) & np.isfinite(sums).all(-1, keepdims=True))
        y = np.where(afresh, new.astype(np.float64) @ w, y)
    return y, new


def _matmul(feeds: Feeds, w: Array) -> list[Array]:
    x, step = feeds["X"], feeds["step"]
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(step > 0, np.rint(x / step) * step, x).astype(np.float32)
    y, last = _sums(x, feeds["last"], feeds["sum"], feeds["threshold"], w)
    return [y, last]


def _sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _gru(f: Feeds, w: Array, r: Array, bias_x: Array, bias_h: Array) -> list[Array]:
    m_x, x_last = _sums(f["X"], f["x_last"], f["m_x"], f["x_threshold"], w)
    m_h, h_last = _sums(f["H"], f["h_last"], f["m_h"], f["h_threshold"], r)
    (xz, xr, xn), (hz, hr, hn) = np.split(m_x + bias_x, 3, -1), np.split(m_h + bias_h, 3, -1)
    z = _sigmoid(xz + hz)
    n = np.tanh(xn + _sigmoid(xr + hr) * hn)
    return [(1 - z) * n + z * f["H"], x_last, h_last, m_x, m_h]


def _lstm(f: Feeds, w: Array, r: Array, bias: Array) -> list[Array]:
    # One product of both: the sums start afresh together.
    both, last = (np.concatenate(names, -1) for names in ((f["X"], f["H"]), (f["x_last"], f["h_last"])))
    thresholds = np.repeat([f["x_threshold"][0], f["h_threshold"][0]], [len(w), len(r)])
    m, sent = _sums(both, last, f["m"], thresholds, np.concatenate([w, r]))
    i, o, forget, c = np.split(m + bias, 4, -1)
    cell = _sigmoid(forget) * f["C"] + _sigmoid(i) * np.tanh(c)
    return [_sigmoid(o) * np.tanh(cell), cell, *np.split(sent, [len(w)], -1), m]


def _assert_close(actual: Sequence[Array], expected: Sequence[Array], share: float = 1e-5) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == np.float32
        assert found.shape == wanted.shape
        scale = np.max(np.abs(wanted), initial=1e-30)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=share * scale)


def _matmul_feeds(rng: np.random.Generator, batch: int, k: int, n: int, threshold: float) -> Feeds:
    last = _normal(rng, batch, k)
    return {
        "X": np.where(rng.random((batch, k)) < 0.5, _normal(rng, batch, k), last),
        "last": last,
        "sum": _normal(rng, batch, n),
        "threshold": np.full(1, threshold, np.float32),
        "step": np.zeros(1, np.float32),
    }


def _cell_weights(rng: np.random.Generator, op: str, inputs: int, units: int) -> Feeds:
    columns = GATES[op] * units
    weights = {
        "W": _normal(rng, inputs, columns) / np.float32(np.sqrt(inputs + 1)),
        "R": _normal(rng, units, columns) / np.float32(np.sqrt(units)),
    }
    return weights | {name: _normal(rng, columns) / 2 for name in BIASES[op]}


def _cell_feeds(rng: np.random.Generator, op: str, batch: int, inputs: int, units: int, threshold: float) -> Feeds:
    lengths = {"X": inputs, "x_last": inputs} | dict.fromkeys(("m", "m_x", "m_h"), GATES[op] * units)
    feeds = {name: _normal(rng, 1, batch, lengths.get(name, units)) for name in INPUTS[op]}
    return feeds | dict.fromkeys(("x_threshold", "h_threshold"), np.full(1, threshold, np.float32))


def _expected(op: str, feeds: Feeds, weights: Feeds, *, int8: bool) -> list[Array]:
    matrices = [_dense(weights[name], int8=int8) for name in WEIGHTS[op]]
    if op == "DeltaMatMul":
        return _matmul(feeds, *matrices)
    reference = _gru if op == "DeltaGRU" else _lstm
    return reference(feeds, *matrices, *(weights[name] for name in BIASES[op]))


# 1, 3 and 4 rows a pass; columns around a cache line and a block; and batches that need all of W.
SIZES = [(1, 1), (3, 5), (7, 1), (64, 33), (67, 576), (130, 2048), (131, 2049), (96, 4111), (600, 4)]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_matmul_equals_reference(k: int, n: int, threads: int, int8: bool) -> None:
    rng = np.random.default_rng(k * 10007 + n)
    w = _normal(rng, k, n)
    session = _session("DeltaMatMul", {"W": w}, int8=int8, threads=threads)
    for batch in (1, 3, 20, 300) if n < 100 else (1, 3, 20):
        for threshold in (-1.0, 0.0, 0.5, np.inf):
            feeds = _matmul_feeds(rng, batch, k, n, threshold)
            _assert_close(session.run(None, feeds), _expected("DeltaMatMul", feeds, {"W": w}, int8=int8))


def test_matmul_quantizes_and_compares_each_input_on_its_own() -> None:
    rng = np.random.default_rng(0)
    w = _normal(rng, 67, 40)
    session = _session("DeltaMatMul", {"W": w})
    for steps in (np.full(1, 0.25, np.float32), np.where(rng.random(67) < 0.5, 0.1, -1.0).astype(np.float32)):
        feeds = _matmul_feeds(rng, 3, 67, 40, 0.0) | {"step": steps}
        feeds["threshold"] = np.abs(_normal(rng, 67))
        feeds["X"][0, :4] = [0.125, -0.125, 0.375, 3e7]
        _assert_close(session.run(None, feeds), _matmul(feeds, w.astype(np.float64)))


def test_matmul_sends_nothing_twice_whatever_the_step() -> None:
    rng = np.random.default_rng(1)
    w = _normal(rng, 300, 20)
    session = _session("DeltaMatMul", {"W": w})
    feeds = _matmul_feeds(rng, 2, 300, 20, 0.0) | {"step": np.full(1, 0.1, np.float32)}
    feeds["sum"], feeds["last"] = session.run(None, feeds)
    again = session.run(None, feeds)
    np.testing.assert_array_equal(again[0], feeds["sum"])
    np.testing.assert_array_equal(again[1], feeds["last"])


@pytest.mark.parametrize("shape", [(67,), (1, 1, 67), (2, 3, 67), (0, 67)])
def test_matmul_takes_any_rank(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    w = _normal(rng, 67, 9)
    feeds = _matmul_feeds(rng, 1, 67, 9, 0.3)
    feeds |= {"X": _normal(rng, *shape), "last": _normal(rng, *shape), "sum": _normal(rng, *shape[:-1], 9)}
    _assert_close(_session("DeltaMatMul", {"W": w}).run(None, feeds), _matmul(feeds, w.astype(np.float64)))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 0)])
def test_matmul_of_nothing(k: int, n: int) -> None:
    feeds = _matmul_feeds(np.random.default_rng(3), 2, k, n, 0.0)
    y, last = _session("DeltaMatMul", {}).run(None, feeds | {"W": np.zeros((k, n), np.float32)})
    np.testing.assert_array_equal(y, feeds["sum"])
    np.testing.assert_array_equal(last, feeds["X"])


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_matmul_forgets_what_is_not_finite(special: float, batch: int) -> None:
    rng = np.random.default_rng(4)
    w = _normal(rng, 30, 50)
    session = _session("DeltaMatMul", {"W": w})
    feeds = _matmul_feeds(rng, batch, 30, 50, 0.5)
    clean = feeds["X"].copy()
    feeds["X"][0, 7] = special
    before = session.run(None, feeds)
    assert not np.isfinite(before[0][0]).any()
    _assert_close([y[1:] for y in before], [y[1:] for y in _matmul(feeds, w.astype(np.float64))])
    y, last = session.run(None, feeds | {"X": clean, "sum": before[0], "last": before[1]})
    _assert_close([y[:1]], [last[:1].astype(np.float64) @ w])
    assert last[0, 7] == clean[0, 7]
    assert np.abs(last[0] - clean[0]).max() <= 0.5


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize(("inputs", "units"), [(1, 1), (5, 3), (17, 64), (130, 67), (33, 700)])
def test_cell_equals_reference(op: str, inputs: int, units: int, threads: int, int8: bool) -> None:
    rng = np.random.default_rng(inputs * 10007 + units)
    weights = _cell_weights(rng, op, inputs, units)
    session = _session(op, weights, int8=int8, threads=threads)
    for batch in (1, 3):
        for threshold in (-1.0, 0.0, 0.8, np.inf):
            feeds = _cell_feeds(rng, op, batch, inputs, units, threshold)
            _assert_close(session.run(None, feeds), _expected(op, feeds, weights, int8=int8))


@pytest.mark.parametrize("op", GATES)
def test_gates_saturate(op: str) -> None:
    rng = np.random.default_rng(5)
    weights = _cell_weights(rng, op, 4, 70)
    feeds = _cell_feeds(rng, op, 1, 4, 70, np.inf)
    for name in feeds.keys() & {"m", "m_x", "m_h"}:
        feeds[name] *= 1e4
    _assert_close(_session(op, weights).run(None, feeds), _expected(op, feeds, weights, int8=False), 1e-6)


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_cell_forgets_what_is_not_finite(op: str, special: float) -> None:
    rng = np.random.default_rng(6)
    weights = _cell_weights(rng, op, 9, 21)
    session = _session(op, weights)
    feeds = _cell_feeds(rng, op, 2, 9, 21, 0.1)
    clean = {name: feeds[name].copy() for name in STATES[op] if name in "HC"} | {"X": feeds["X"].copy()}
    feeds["X"][0, 0, 3] = special
    feeds["H"][0, 1, 3] = special
    after = dict(zip(STATES[op], session.run(None, feeds), strict=True))
    if np.isnan(special):
        assert np.isnan(after["H"]).any(-1).all()
    feeds |= after | clean
    outputs = session.run(None, feeds)
    _assert_close(outputs, _expected(op, feeds, weights, int8=False))
    assert all(np.isfinite(y).all() for y in outputs)


def _walk(rng: np.random.Generator, steps: int, size: int) -> Array:
    """Elements that mostly stay as they are."""
    moves = np.where(rng.random((steps, size)) < 0.3, 0.3 * rng.standard_normal((steps, size)), 0)
    walk: Array = rng.standard_normal(size) + np.cumsum(moves, axis=0)
    return walk.astype(np.float32)


def _stock(op: str, inputs: Feeds, outputs: Sequence[str], weights: Feeds, **attributes: Any) -> Any:
    """A session of the op that onnxruntime has."""
    names = [*inputs, *weights]
    order = ["X", "W", "R", "B", "", "H", "C"] if op in ("GRU", "LSTM") else names
    values = [helper.make_tensor_value_info(name, FLOAT, array.shape) for name, array in inputs.items()]
    found = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs if name]
    node = helper.make_node(op, [n for n in order if not n or n in names], list(outputs), **attributes)
    graph = helper.make_graph([node], "g", values, found, [numpy_helper.from_array(w, n) for n, w in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_matmul_over_many_steps_equals_the_dense_product() -> None:
    rng = np.random.default_rng(7)
    w, xs = _normal(rng, 200, 300), _walk(rng, 100, 200)
    feeds = _matmul_feeds(rng, 1, 200, 300, 0.0)
    feeds |= {"last": np.zeros((1, 200), np.float32), "sum": np.zeros((1, 300), np.float32)}
    session, dense = _session("DeltaMatMul", {"W": w}), _stock("MatMul", {"X": feeds["X"]}, ["Y"], {"W": w})
    for x in xs:
        feeds["X"] = x[None]
        feeds["sum"], feeds["last"] = session.run(None, feeds)
        _assert_close([feeds["sum"]], dense.run(None, {"X": feeds["X"]}))


@pytest.mark.parametrize("op", GATES)
def test_cell_over_many_steps_equals_the_dense_op(op: str) -> None:
    rng = np.random.default_rng(8)
    inputs, units = 60, 90
    weights, xs = _cell_weights(rng, op, inputs, units), _walk(rng, 100, inputs)
    feeds = _cell_feeds(rng, op, 1, inputs, units, 0.0)
    feeds |= {name: np.zeros_like(feeds[name]) for name in STATES[op]}
    # Our one bias of an LSTM is the sum of onnx's two.
    biases = [weights[name] for name in BIASES[op]]
    bias = np.concatenate(biases if len(biases) == 2 else [*biases, np.zeros(4 * units, np.float32)])
    stock = {"W": weights["W"].T[None].copy(), "R": weights["R"].T[None].copy(), "B": bias[None]}
    state = {name: np.zeros((1, 1, units), np.float32) for name in STATES[op] if name in "HC"}
    attributes = {"linear_before_reset": 1} if op == "DeltaGRU" else {}
    outputs = ["", *(f"Y_{name}" for name in state)]
    dense = _stock(op.removeprefix("Delta"), {"X": feeds["X"]} | state, outputs, stock, hidden_size=units, **attributes)
    session = _session(op, weights)
    for x in xs:
        feeds["X"] = x[None, None]
        feeds |= dict(zip(STATES[op], session.run(None, feeds), strict=True))
        state = dict(zip(state, dense.run(None, {"X": feeds["X"]} | state), strict=True))
        _assert_close([feeds[name] for name in state], list(state.values()))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("op", INPUTS)
def test_states_in_place(op: str, batch: int, threads: int, int8: bool) -> None:
    rng = np.random.default_rng(9)
    if op == "DeltaMatMul":
        weights = {"W": _normal(rng, 100, 2500)}
        feeds = _matmul_feeds(rng, batch, 100, 2500, 0.2)
    else:
        weights = _cell_weights(rng, op, 70, 701)
        feeds = _cell_feeds(rng, op, batch, 70, 701, 0.5)
    session = _session(op, weights, int8=int8, threads=threads)
    # The values share the arrays' memory.
    memory = {name: array.copy() for name, array in feeds.items()}
    bound = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in memory.items()}
    binding = session.io_binding()
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    for name in STATES[op]:
        binding.bind_ortvalue_output(f"{name}_out", bound[name])
    for step in range(4):
        feeds["X"] = _normal(rng, *feeds["X"].shape)
        if step == 1:
            feeds["X"].flat[3] = np.nan
        bound["X"].update_inplace(feeds["X"])
        session.run_with_iobinding(binding)
        feeds |= dict(zip(STATES[op], session.run(None, feeds), strict=True))
        for name in STATES[op]:
            np.testing.assert_array_equal(bound[name].numpy(), feeds[name])
        np.testing.assert_array_equal(bound["X"].numpy(), feeds["X"])


BAD_MATMUL: list[tuple[dict[str, tuple[int, ...]], str]] = [
    ({"X": (1, 7), "last": (1, 7)}, "last axis of X"),
    ({"X": ()}, "last axis of X"),
    ({"last": (1, 7)}, "last has to have the shape of X"),
    ({"last": (2, 8)}, "last has to have the shape of X"),
    ({"last": (8,)}, "last has to have the shape of X"),
    ({"sum": (1, 5)}, "sum has to have"),
    ({"sum": (2, 4)}, "sum has to have"),
    ({"sum": ()}, "sum has to have"),
    ({"threshold": (2,)}, "threshold has to hold"),
    ({"threshold": (0,)}, "threshold has to hold"),
    ({"threshold": (1, 8)}, "threshold has to hold"),
    ({"step": (7,)}, "step has to hold"),
    ({"W": (2, 8, 4)}, "two axes"),
    ({"W": (8,)}, "two axes"),
]


@pytest.mark.parametrize(("shapes", "message"), BAD_MATMUL)
def test_matmul_refuses_wrong_shapes(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    right = {"X": (1, 8), "last": (1, 8), "sum": (1, 4), "threshold": (1,), "step": (1,), "W": (8, 4)}
    feeds = {name: np.ones(shape, np.float32) for name, shape in (right | shapes).items()}
    with pytest.raises(Exception, match=f"DeltaMatMul: .*{message}"):
        _session("DeltaMatMul", {}).run(None, feeds)


@pytest.mark.parametrize("op", GATES)
def test_cell_refuses_wrong_shapes(op: str) -> None:
    rng = np.random.default_rng(10)
    session = _session(op, {})
    right = _cell_feeds(rng, op, 2, 5, 6, 0.0) | _cell_weights(rng, op, 5, 6)
    session.run(None, right)
    for name, array in right.items():
        for axis in range(array.ndim):
            for longer in (False, True):
                shape = [length + (longer if i == axis else 0) for i, length in enumerate(array.shape)]
                if not longer:
                    shape[axis] = 0
                with pytest.raises(Exception, match=f"{op}: "):
                    session.run(None, right | {name: np.ones(shape, np.float32)})
        with pytest.raises(Exception, match=f"{op}: "):
            session.run(None, right | {name: array[None].repeat(2, axis=0)})


@pytest.mark.parametrize("op", INPUTS)
def test_shapes_are_inferred_with_symbols(op: str, tmp_path: Any) -> None:
    shapes: dict[str, Sequence[str | int]] = {
        name: [1, "batch", name] for name in INPUTS[op] if "threshold" not in name and name != "step"
    }
    session = _session(op, {}, shapes=shapes, path=str(tmp_path / "optimised.onnx"))
    found = {output.name: output.shape for output in session.get_outputs()}
    assert found == {f"{name}_out": shapes[name] for name in STATES[op]}
