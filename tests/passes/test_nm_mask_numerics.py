"""What masks cost on data that was not seen, in onnxruntime; layers are fitted in order, and in little memory."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.edit import constant
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.rewrite import Context
from onnxcomp.stats import Group

WIDTH = 64
MIXING = np.random.default_rng(11).normal(size=(24, WIDTH)) * np.random.default_rng(12).uniform(0.1, 3, WIDTH)
METHODS = ("magnitude", "wanda", "ria", "sparsegpt")


def feeds(count: int = 12, seed: int = 0, rows: int = 64) -> list[dict[str, np.ndarray]]:
    """Samples of rows whose channels depend on each other and differ in size."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 1, rows, 24)) @ MIXING + 0.2 * random.normal(size=(count, 1, rows, WIDTH))
    return [{"x": sample.astype(np.float32)} for sample in x]


def images(count: int = 10, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Samples of 16 channels that depend on each other, smooth in space."""
    random = np.random.default_rng(seed)
    x = np.einsum("nchw,cd->ndhw", random.normal(size=(count, 6, 13, 13)), MIXING[:6, :16])
    x = x[..., 1:, 1:] + x[..., :-1, :-1] + 0.2 * random.normal(size=(count, 16, 12, 12))
    return [{"x": sample[None].astype(np.float32)} for sample in x]


def linear(b) -> ir.Model:
    return b.output(b.op("MatMul", b.input("x", [1, "t", WIDTH]), b.floats(WIDTH, 48), name="layer")).model()


def convolution(b, group: int = 1) -> ir.Model:
    weight = b.floats(24, 16 // group, 3, 3)
    y = b.op("Conv", b.input("x", [1, 16, 12, 12]), weight, name="layer", pads=[1, 1, 1, 1], group=group)
    return b.output(y).model()


CASES = {
    "matmul": (linear, feeds),
    "conv": (convolution, images),
    "grouped conv": (lambda b: convolution(b, 2), images),
}


def error(outputs, dense: ir.Model, sparse: ir.Model, data: list[dict[str, np.ndarray]]) -> float:
    pairs = [(outputs(sparse, feed)[0], outputs(dense, feed)[0]) for feed in data]
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("case", CASES)
def test_error_on_other_data(case, pattern, b, run_passes, outputs):
    """SparseGPT beats Wanda beats magnitude; least squares lowers the error of every mask."""
    make, data = CASES[case]
    model, found = make(b), {}
    for method in METHODS:
        for reconstruct in (False, True):
            sparse = model.clone()
            step = NmMask(pattern=pattern, method=method, reconstruct=reconstruct, include_ends=True)
            run_passes(sparse, step, data=data())
            found[method, reconstruct] = error(outputs, model, sparse, data(seed=1))
    assert found["sparsegpt", False] < 0.9 * found["wanda", False]
    assert found["wanda", False] < 0.97 * found["magnitude", False]
    assert found["ria", False] < 0.97 * found["magnitude", False]
    for method in METHODS:
        assert found[method, True] < (0.98 if method == "sparsegpt" else 0.85) * found[method, False]


def test_report_tells_the_error(b, run_passes, outputs):
    """What is said of held-out samples is what other data shows, within a few percent of it."""
    model = linear(b)
    sparse = model.clone()
    (edit,) = run_passes(sparse, NmMask(method="wanda", reconstruct=True, include_ends=True), data=feeds()).edits
    before, after = (
        float(edit.detail.split(mark)[1].split("%")[0]) / 100 for mark in ("the error from ", "output error ")
    )
    assert f" to {after:.1%}" in edit.detail
    assert after == pytest.approx(error(outputs, model, sparse, feeds(seed=1)), rel=0.1)
    plain = model.clone()
    run_passes(plain, NmMask(method="wanda", include_ends=True), data=feeds())
    assert before == pytest.approx(error(outputs, model, plain, feeds(seed=1)), rel=0.1)


def test_few_samples_do_no_harm(b, run_passes, outputs):
    """Fewer rows than inputs: outputs for which updates fit noise keep Wanda's mask and their weights."""
    model, errors = linear(b), {}
    for method in ("wanda", "sparsegpt"):
        sparse = model.clone()
        step = NmMask(method=method, reconstruct=method == "sparsegpt", damp=1e-6, include_ends=True)
        (edit,) = run_passes(sparse, step, data=feeds(4, rows=8)).edits
        errors[method] = error(outputs, model, sparse, feeds(seed=1))
    assert "outputs, whose held-out error is lower" in edit.detail
    assert errors["sparsegpt"] < 1.1 * errors["wanda"]


@pytest.mark.parametrize("config", [{"method": "ria"}, {"method": "wanda"}, {"reconstruct": True}])
def test_batches_do_not_matter(config, b, run_passes):
    b.op("MatMul", b.input("x", ["n", "t", WIDTH]), b.floats(WIDTH, 48), name="first")
    model = b.output(b.op("MatMul", b.op("Relu", "first_out"), b.floats(48, 8), name="second")).model()
    samples, weights = np.concatenate([feed["x"] for feed in feeds()]), []
    for size in (1, 3, 12):
        sparse = model.clone()
        batches = [{"x": samples[i : i + size]} for i in range(0, 12, size)]
        run_passes(sparse, NmMask(include_ends=True, positions=40, **config), data=batches)
        weights.append([constant(sparse.graph.initializers[name]) for name in ("c0", "c1")])
    for other in weights[1:]:
        for one, two in zip(weights[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("inputs_per_run", [1, 2])
def test_layers_see_what_masked_layers_put_out(inputs_per_run, b, run_passes, outputs):
    """The second mask is that of inputs behind the masked first layer, unless both are observed in one run."""
    y = b.op("Relu", b.op("MatMul", b.input("x", [1, "t", WIDTH]), b.floats(WIDTH, 48), name="first"))
    model = b.output(b.op("MatMul", y, b.floats(48, 256), name="second")).output(y).model()
    sparse = model.clone()
    step = NmMask(method="wanda", include_ends=True, inputs_per_run=inputs_per_run)
    run_passes(sparse, step, data=feeds())
    seen = sparse if inputs_per_run == 1 else model
    rows = np.concatenate([outputs(seen, feed)[1][0] for feed in feeds()])
    scores = np.abs(constant(model.graph.initializers["c1"])) * np.linalg.norm(rows, axis=0)[:, None]
    order = np.argsort(-scores.reshape(12, 4, 256), axis=1)
    mask = np.zeros((12, 4, 256), bool)
    np.put_along_axis(mask, order[:, :2], values=True, axis=1)
    agree = (mask.reshape(48, 256) == (constant(sparse.graph.initializers["c1"]) != 0)).mean()
    assert agree > 0.9999
    other = np.concatenate([outputs(model if inputs_per_run == 1 else sparse, feed)[1][0] for feed in feeds()])
    scores = np.abs(constant(model.graph.initializers["c1"])) * np.linalg.norm(other, axis=0)[:, None]
    order = np.argsort(-scores.reshape(12, 4, 256), axis=1)
    mask[:] = False
    np.put_along_axis(mask, order[:, :2], values=True, axis=1)
    assert (mask.reshape(48, 256) == (constant(sparse.graph.initializers["c1"]) != 0)).mean() < agree


def chain(b, layers: int, width: int) -> ir.Model:
    y = b.input("x", [1, "t", width])
    for i in range(layers):
        y = b.op("Tanh", b.op("MatMul", y, b.floats(width, width), name=f"layer{i}"))
    return b.output(y).model()


def test_inputs_are_observed_a_few_at_a_time(b, capabilities):
    """Layers of the same input count once; memory is another limit."""
    y = b.input("x", [1, "t", 64])
    for i in range(3):
        parts = [b.op("MatMul", y, b.floats(64, 64), name=f"{part}{i}") for part in ("query", "key")]
        y = b.op("Tanh", b.op("MatMul", b.op("Add", *parts), b.floats(64, 64), name=f"out{i}"))
    model = b.output(y).model()
    names: list[int] = []

    def sweep(on: ir.Model, observers, limit=None) -> None:
        names.append(len(observers))
        for observer in observers.values():
            assert isinstance(observer, Group)
            for i in range(2):
                observer.update(np.random.default_rng(i).normal(size=(1, 20, 64)).astype(np.float32))

    def runs(**config) -> list[int]:
        names.clear()
        NmMask(include_ends=True, **config).apply(model.clone(), Context(capabilities=capabilities, sweep=sweep))
        return list(names)

    assert runs() == [4, 2]
    assert runs(inputs_per_run=1) == [1] * 6
    assert runs(inputs_per_run=100, method="wanda") == [6]


def test_memory_does_not_grow_with_layers(run_passes, builder_of):
    """Second moments of 24 layers of 192 inputs would take 14 MB."""
    peaks, weights = {}, {}
    data = [{"x": np.random.default_rng(i).normal(size=(1, 8, 192)).astype(np.float32)} for i in range(2)]
    for layers in (4, 24):
        model = chain(builder_of(), layers, 192)
        weights[layers] = layers * 192 * 192 * 4
        tracemalloc.start()
        run_passes(model, NmMask(inputs_per_run=2), data=data)
        peaks[layers] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[24] - peaks[4] < 1.5 * (weights[24] - weights[4]) + 1e6


@pytest.fixture
def builder_of():
    from builder import Builder

    return Builder


def trained(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """An MLP trained in numpy to tell eight noisy patterns apart: its weights, test inputs and labels."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(8, 4, WIDTH)) * random.uniform(0.2, 2, WIDTH)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 8, count)
        clean = centers[labels, random.integers(0, 4, count)]
        return (clean + 1.3 * random.normal(size=(count, WIDTH))).astype(np.float32), labels

    sizes = (WIDTH, 64, 64, 8)
    weights = [random.normal(size=s) * np.sqrt(2 / s[0]) for s in pairwise(sizes)]
    moments = [np.zeros_like(w) for w in weights]
    for _ in range(600):
        x, labels = draw(128)
        values = [x]
        for w in weights[:-1]:
            values.append(np.maximum(values[-1] @ w, 0))
        logits = values[-1] @ weights[-1]
        logits = np.exp(logits - logits.max(axis=1, keepdims=True))
        back = (logits / logits.sum(axis=1, keepdims=True) - np.eye(8)[labels]) / len(x)
        for i in reversed(range(3)):
            gradient = values[i].T @ back
            back = (back @ weights[i].T) * (values[i] > 0)
            moments[i] = 0.9 * moments[i] + gradient
            weights[i] -= 0.05 * moments[i]
    return [w.astype(np.float32) for w in weights], *draw(2000)


def test_trained_network_keeps_its_accuracy(b, run_passes, outputs):
    weights, x, labels = trained()
    y = b.input("x", ["n", WIDTH])
    for i, weight in enumerate(weights):
        y = b.op("Gemm", y if i == 0 else b.op("Relu", y), b.const(weight), name=f"layer{i}")
    model = b.output(y).model()

    def accuracy(of: ir.Model) -> float:
        return float((outputs(of, {"x": x[1000:]})[0].argmax(axis=1) == labels[1000:]).mean())

    found = {"dense": accuracy(model)}
    for method in METHODS:
        for reconstruct in (False, True):
            sparse = model.clone()
            step = NmMask(pattern="1:4", method=method, reconstruct=reconstruct)
            report = run_passes(sparse, step, data=[{"x": x[:1000]}])
            assert {e.node for e in report.edits if e.action == "applied"} == {"layer0", "layer1"}
            found[method, reconstruct] = accuracy(sparse)
    assert found["dense"] > 0.9
    assert found["sparsegpt", True] > found["dense"] - 0.1
    assert found["sparsegpt", False] > found["magnitude", False]
    assert all(found[m, True] > found[m, False] for m in METHODS if m != "sparsegpt")
