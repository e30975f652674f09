from __future__ import annotations

import math

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm_harness import AVX512, machines, run_kernel, tensor  # noqa: E402,F401

from onnxcomp.targets.tvm.kernels import elementwise, norm, softmax  # noqa: E402
from onnxcomp.targets.tvm.kernels._epilogue import ACTIVATIONS, Epilogue  # noqa: E402

RNG = np.random.default_rng(0)
each_machine = pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32) * 3


def softmaxed(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@each_machine
@pytest.mark.parametrize("n", [1, 7, 16, 37, 64])
@pytest.mark.parametrize("symbolic", [False, True])
def test_softmax(machine, n, symbolic):
    x = values(5, n)
    function = softmax.softmax(machine, outer=(None if symbolic else 5,), n=None if symbolic else n)
    np.testing.assert_allclose(run_kernel(function, machine, x, shape=x.shape), softmaxed(x), rtol=2e-6, atol=1e-9)


@each_machine
@pytest.mark.parametrize("n", [5, 37])
@pytest.mark.parametrize("has", [(False, False, True), (True, False, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_softmax_with_a_mask_and_a_scale(machine, n, has, symbolic):
    sizes = (2, 3, 4)
    x = values(*sizes, n)
    mask = np.where(RNG.random([s if h else 1 for s, h in zip(sizes, has, strict=True)] + [n]) < 0.3, -1e9, 0.5)
    mask[..., 0] = 0
    outer = (2, 3, None) if symbolic else sizes
    function = softmax.softmax(machine, outer=outer, n=None if symbolic else n, mask=has, scale=0.125)
    y = run_kernel(function, machine, x, mask.astype(np.float32), shape=x.shape)
    np.testing.assert_allclose(y, softmaxed(x * 0.125 + mask), rtol=2e-6, atol=1e-9)


@each_machine
def test_softmax_of_infinite_scores_and_a_scale(machine):
    x = values(3, 21)
    x[0, 4:9] = -np.inf
    y = run_kernel(softmax.softmax(machine, outer=(3,), n=21, scale=2.0), machine, x, shape=x.shape)
    np.testing.assert_allclose(y, softmaxed(x * 2), rtol=2e-6, atol=1e-9)


@each_machine
@pytest.mark.parametrize("n", [3, 16, 57, 384])
@pytest.mark.parametrize("symbolic", [False, True])
def test_layer_norm(machine, n, symbolic):
    x, scale, bias = values(7, n) + 5, values(n), values(n)
    function = norm.norm(machine, rows=None if symbolic else 7, n=n, epsilon=1e-3, centred=True, bias=True)
    y = run_kernel(function, machine, x, scale, bias, shape=x.shape)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-3) * scale + bias
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@each_machine
@pytest.mark.parametrize("n", [3, 16, 57, 200])
def test_rms_norm(machine, n):
    x, scale = values(3, n), values(n)
    function = norm.norm(machine, rows=3, n=n, epsilon=1e-3, centred=False, bias=False)
    y = run_kernel(function, machine, x, scale, shape=x.shape)
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)


def activated(kind: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-x))
    hard = np.clip(x / 6 + 0.5, 0, 1)
    return {
        "": x,
        "relu": np.maximum(x, 0),
        "clip": np.clip(x, 0.1, 0.4),
        "leaky_relu": np.where(x < 0, x * 0.1, x),
        "sigmoid": sigmoid,
        "tanh": np.tanh(x),
        "silu": x * sigmoid,
        "gelu": x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5)),
        "gelu_tanh": x * 0.5 * (1 + np.tanh((x + 0.044715 * x**3) * (2 / np.pi) ** 0.5)),
        "hard_sigmoid": np.clip(x * 0.1 + 0.4, 0, 1),
        "hard_swish": x * hard,
    }[kind]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(kind):
    machine = machines()[-1]
    x = values(16 * 130 + 3)
    function = elementwise.activation(machine, size=x.size, epilogue=Epilogue(activation=kind, alpha=0.1, beta=0.4))
    y = run_kernel(function, machine, x, shape=x.shape)
    np.testing.assert_allclose(y, activated(kind, x), rtol=2e-6, atol=2e-6)


@each_machine
@pytest.mark.parametrize("size", [1, 15, 16, 39])
def test_activation_of_any_size(machine, size):
    x = values(size)
    function = elementwise.activation(machine, size=None, epilogue=Epilogue(activation="gelu"))
    np.testing.assert_allclose(
        run_kernel(function, machine, x, shape=x.shape), activated("gelu", x), rtol=2e-6, atol=1e-6
    )
