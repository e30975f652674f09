"""Small float models for the passes, and what runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import OrtCpu, reference_runner


@pytest.fixture
def b() -> Builder:
    return Builder()


@pytest.fixture(scope="session")
def capabilities():
    return OrtCpu().capabilities()


@pytest.fixture
def run_passes(capabilities):
    """Runs passes on a model in place and returns the last report."""

    def run(model: ir.Model, *passes: Any, data: Any = None, check: str = "graph"):
        pipeline = Pipeline(passes=passes, capabilities=capabilities, runner=reference_runner, check=check)
        return pipeline.run(model, data)[-1]

    return run


@pytest.fixture
def outputs():
    """Outputs of a model for one feed."""

    def run(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        names = [v.name for v in model.graph.outputs]
        found = reference_runner(model, names)(feed)
        return [found[n] for n in names]

    return run


def cnn() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Conv, ReLU6, depthwise Conv, residual Add, max pooling, global pooling, Gemm."""
    b = Builder()
    y = b.op("Conv", b.input("x", [1, 3, 16, 16]), b.floats(8, 3, 3, 3), b.floats(8), name="stem", pads=[1, 1, 1, 1])
    y = b.op("Clip", y, b.const(np.float32(0)), b.const(np.float32(6)), name="relu6")
    z = b.op("Conv", y, b.floats(8, 1, 3, 3), name="depthwise", pads=[1, 1, 1, 1], group=8)
    z = b.op("Add", y, z, name="residual")
    z = b.op("MaxPool", z, name="pool", kernel_shape=[2, 2], strides=[2, 2])
    z = b.op("Conv", z, b.floats(4, 8, 1, 1), name="last")
    z = b.op("Flatten", b.op("GlobalAveragePool", z, name="average"), name="flat")
    z = b.op("Gemm", z, b.floats(5, 4), b.floats(5), name="classify", transB=1)
    return b.output(z).model(), {"x": np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)}


def attention() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A pre-norm block with one fused projection for query, key and value, two heads of eight, and a GELU MLP."""
    b = Builder()
    x = b.input("x", [1, 12, 16])
    scaled = lambda *shape: b.const((b.rng.normal(size=shape) * 0.3).astype(np.float32))  # noqa: E731
    norm = b.op("LayerNormalization", x, b.floats(16), b.floats(16), name="norm1")
    qkv = b.op("Add", b.op("MatMul", norm, scaled(16, 48), name="qkv"), b.floats(48), name="qkv_bias")
    qkv = b.op("Transpose", b.op("Reshape", qkv, b.const(np.array([1, 12, 3, 2, 8]))), perm=[2, 0, 3, 1, 4])
    q, k, v = (b.op("Gather", qkv, b.const(np.int64(i)), axis=0) for i in range(3))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1), v, name="weighted")
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.const(np.array([1, 12, 16])), name="merged")
    y = b.op("Add", b.op("MatMul", y, scaled(16, 16), name="proj"), b.floats(16), name="proj_bias")
    x = b.op("Add", x, y)
    norm = b.op("LayerNormalization", x, b.floats(16), b.floats(16), name="norm2")
    y = b.op("Add", b.op("MatMul", norm, scaled(16, 32), name="fc1"), b.floats(32))
    half = b.op("Mul", y, b.const(np.float32(0.5)))
    erf = b.op("Erf", b.op("Div", y, b.const(np.float32(2**0.5))))
    y = b.op("Mul", half, b.op("Add", erf, b.const(np.float32(1))), name="gelu")
    y = b.op("Add", b.op("MatMul", y, scaled(32, 16), name="fc2"), b.floats(16))
    model = b.output(b.op("Add", x, y, name="out")).model()
    return model, {"x": np.random.default_rng(1).normal(size=(1, 12, 16)).astype(np.float32)}


def branching() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A MatMul inside an If, and a weight that two MatMuls share outside."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[3, 4] x, bool c) => (float[3, 4] y)
        <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
            first = MatMul(x, w)
            second = MatMul(first, w)
            y = If (c) <
                then_branch = t () => (float[3, 4] p) { p = MatMul(second, w) },
                else_branch = e () => (float[3, 4] q) { q = Identity(second) }>
        }""")
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{i}"
    return model, {"x": np.eye(3, 4, dtype=np.float32), "c": np.array(True)}


MODELS = {"cnn": cnn, "attention": attention, "branching": branching}


@pytest.fixture(params=sorted(MODELS))
def example(request):
    return MODELS[request.param]()


@pytest.fixture
def cnn_example():
    return cnn()


@pytest.fixture
def attention_example():
    return attention()


@pytest.fixture
def branching_example():
    return branching()
