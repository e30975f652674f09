"""The built-in passes on random small graphs: valid, same interface, near the original, stable when run again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.metrics import sqnr
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.quantize import Quantize
from onnxcomp.targets.ort import OrtCpu, reference_runner
from onnxcomp.testing import check_pass

SEEDS = range(40)


def random_cnn(seed: int) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A random directed graph of convolutional ops on `[2, 4, 8, 8]`, with one to three outputs."""
    random = np.random.default_rng(seed)
    b = Builder()
    b.rng = np.random.default_rng(1000 + seed)
    values = [b.input("x", [2, 4, 8, 8])]
    weights: list[str] = []

    def pick() -> str:
        return values[-1] if random.random() < 0.6 else values[random.integers(len(values))]

    def weight(*shape: int) -> str:
        return b.const((b.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    def conv() -> str:
        if not weights or random.random() < 0.8:
            weights.append(weight(4, 4, 3, 3))
        bias = [b.floats(4)] if random.random() < 0.5 else []
        return b.op("Conv", pick(), weights[random.integers(len(weights))], *bias, pads=[1, 1, 1, 1])

    def depthwise() -> str:
        return b.op("Conv", pick(), weight(4, 1, 3, 3), pads=[1, 1, 1, 1], group=4)

    def constant(op: str) -> str:
        shape = [(), (1,), (4, 1, 1), (1, 4, 1, 1)][random.integers(4)]
        array = b.const(b.rng.uniform(0.5, 1.5, shape).astype(np.float32))
        return b.op(op, *((pick(), array) if random.random() < 0.7 or op == "Div" else (array, pick())))

    def clip() -> str:
        low, high = [(0.0, 6.0), (-1.0, 1.0), (0.0, 1.0), (0.1, 2.0)][random.integers(4)]
        return b.op("Clip", pick(), b.const(np.float32(low)), b.const(np.float32(high)))

    def concat() -> str:
        return b.op("Conv", b.op("Concat", pick(), pick(), axis=1), weight(4, 8, 1, 1))

    makers = [
        conv, conv, conv, depthwise, concat, clip,
        lambda: b.op("Relu", pick()),
        lambda: b.op("Sigmoid", pick()),
        lambda: b.op("Tanh", pick()),
        lambda: b.op("Add", pick(), pick()),
        lambda: constant("Mul"), lambda: constant("Add"), lambda: constant("Sub"), lambda: constant("Div"),
        lambda: b.op("MaxPool", pick(), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        lambda: b.op("AveragePool", pick(), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        lambda: b.op("Transpose", pick(), perm=[0, 1, 3, 2]),
        lambda: b.op(
            "BatchNormalization", pick(), *(b.const(b.rng.uniform(0.5, 2, 4).astype(np.float32)) for _ in range(4))
        ),
    ]  # fmt: skip
    for maker in random.integers(len(makers), size=random.integers(3, 12)):
        values.append(makers[maker]())  # noqa: PERF401 - the makers read `values`
    head = b.op("Flatten", b.op("GlobalAveragePool", pick()))
    values.append(b.op("Gemm", head, weight(5, 4), b.floats(5), transB=1))
    for value in dict.fromkeys([values[-1], *(pick() for _ in range(random.integers(0, 3)))]):
        if value != "x":
            b.output(value)
    return b.model(), {"x": random.normal(size=(2, 4, 8, 8)).astype(np.float32)}


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return reference_runner(model, [v.name or "" for v in model.graph.outputs])(feed)


@pytest.mark.parametrize("seed", SEEDS)
def test_cleanup_keeps_the_function(seed, run_passes):
    model, feed = random_cnn(seed)
    before = run(model, feed)
    run_passes(model, Cleanup())
    after = run(model, feed)
    assert list(after) == list(before)
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("seed", SEEDS)
def test_quantize_stays_near_the_original(seed, run_passes, tmp_path):
    model, feed = random_cnn(seed)
    before = run(model, feed)
    run_passes(model, Cleanup())
    run_passes(model, Quantize(), data=[feed])
    after = run(model, feed)
    assert list(after) == list(before)
    for name, expected in before.items():
        assert sqnr(expected, after[name]) > 20
    artifact = OrtCpu().compile(model, tmp_path / "artifact")
    session = OrtCpu().load(artifact)
    for name, found in session.run(feed).items():
        assert sqnr(after[name], found) > 25, "integer kernels do what the Q/DQ graph says"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", [Cleanup(), Quantize()], ids=["cleanup", "quantize"])
def test_contract(step, seed, capabilities):
    model, feed = random_cnn(seed)
    check_pass(step, model, capabilities=capabilities, runner=reference_runner, data=[feed])
