"""Builds the small Q/DQ models that the tests of the ONNX Runtime target need; tests get them as fixtures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder


@pytest.fixture
def b() -> Builder:
    return Builder()


@pytest.fixture
def small_model() -> ir.Model:
    """Conv, Relu, Conv, pooling and a classifier, all quantized."""
    b = Builder()
    y = b.qdq(b.op("Relu", b.conv(b.image(), "conv1")), zero=0)
    y = b.qdq(b.conv(y, "conv2"))
    y = b.qdq(b.op("GlobalAveragePool", y))
    y = b.qdq(b.op("Flatten", y))
    y = b.op("Gemm", y, b.weight((4, 8), 0), b.bias(), name="classify", transB=1)
    return b.output(y).model()


@pytest.fixture
def feed() -> dict[str, Any]:
    return {"x": np.random.default_rng(0).normal(size=(1, 8, 16, 16)).astype(np.float32)}


@pytest.fixture
def streaming_model() -> ir.Model:
    """Returns the running sum of its input, which it carries as state."""
    b = Builder()
    total = b.op("Add", b.input("x", [3]), b.input("before", [3]), name="total")
    after = b.op("Identity", total, name="after")
    b.metadata["onnxcomp.state"] = json.dumps([{"input": "before", "output": after, "shape": [3], "dtype": "float32"}])
    return b.output(total).output(after).model()
