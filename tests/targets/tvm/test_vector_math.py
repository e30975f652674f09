from __future__ import annotations

import math

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm.script import tirx as T  # noqa: E402, N812
from tvm_harness import machines, run_kernel  # noqa: E402

from onnxcomp.targets.tvm.kernels import vector_math  # noqa: E402

erf = np.vectorize(math.erf, otypes=[np.float64])
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, -1e-30, 3e38, -3e38, 1, -1, 88.7, 88.73, -87.3, -104, 89], np.float32
)


def applied(function, lanes: int, size: int):
    def index(i):
        return T.ramp(i * lanes, 1, lanes) if lanes > 1 else i

    @T.prim_func
    def kernel(x: T.Buffer((size,), "float32"), y: T.Buffer((size,), "float32")):
        for i in T.serial(size // lanes):
            y[index(i)] = function(x[index(i)])

    return kernel


def values(machine, name: str, x: np.ndarray) -> np.ndarray:
    function = getattr(vector_math, name)
    return run_kernel(applied(function, machine.lanes, x.size), machine, x, shape=x.shape)


@pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "relative"),
    [
        ("exp", np.exp, -86.89, 88.72, 2 * 2**-23),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), -87, 90, 1e-6),
        ("tanh", np.tanh, -12, 12, 1e-6),
        ("erf", erf, -5, 5, 1e-6),
        ("log", np.log, 1e-3, 50, 1e-6),
        ("log", np.log, 1e-37, 1e38, 1e-6),
        ("rsqrt", lambda x: x**-0.5, 1e-30, 1e4, 1e-6),
    ],
)
def test_function_over_a_dense_sweep(machine, name, exact, low, high, relative):
    x = np.concatenate([np.linspace(low, high, 2**16 - 2**12), np.geomspace(max(low, 1e-5), high, 2**12)])
    x = np.clip(x.astype(np.float32), low, high)
    np.testing.assert_allclose(values(machine, name, x), exact(x.astype(np.float64)), rtol=relative, atol=1e-38)


@pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("name", "exact"),
    [("exp", np.exp), ("sigmoid", lambda x: 1 / (1 + np.exp(-x))), ("tanh", np.tanh), ("erf", erf), ("log", np.log)],
)
def test_function_of_special_values(machine, name, exact):
    with np.errstate(all="ignore"):
        expected = exact(SPECIAL.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(values(machine, name, SPECIAL), expected, rtol=1e-6, atol=1e-37)


def test_exp_of_zero_and_below_all_floats_is_exact():
    x = np.array([0.0, -0.0, -200, -np.inf] * 4, np.float32)
    np.testing.assert_array_equal(values(machines()[-1], "exp", x), np.array([1, 1, 0, 0] * 4, np.float32))


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "erf", "log", "rsqrt"])
def test_no_function_calls_the_c_library(name):
    machine = machines()[-1]
    module = tvm.IRModule(
        {"main": applied(getattr(vector_math, name), machine.lanes, 64).with_attr("global_symbol", "main")}
    )
    source = tvm.compile(module, target=machine.target()).mod.inspect_source("asm")
    assert not any(f"{call}{name}f" in source for call in ("callq\t", "call\t", "jmp\t"))


@pytest.mark.parametrize("name", ["exp", "erf", "tanh"])
def test_function_of_one_value(name):
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    exact = {"exp": np.exp, "erf": erf, "tanh": np.tanh}[name]
    y = run_kernel(applied(getattr(vector_math, name), 1, x.size), machines()[0], x, shape=x.shape)
    np.testing.assert_allclose(y, exact(x.astype(np.float64)), rtol=1e-6, atol=1e-38)


def test_functions_in_an_unrolled_loop():
    machine = machines()[-1]
    lanes = machine.lanes
    x = np.linspace(-4, 4, 4 * lanes, dtype=np.float32)

    @T.prim_func
    def kernel(x: T.Buffer((4 * lanes,), "float32"), y: T.Buffer((4 * lanes,), "float32")):
        for i in T.unroll(4):
            y[T.ramp(i * lanes, 1, lanes)] = vector_math.erf(vector_math.exp(x[T.ramp(i * lanes, 1, lanes)]))

    np.testing.assert_allclose(run_kernel(kernel, machine, x, shape=x.shape), erf(np.exp(x)), rtol=2e-6)
