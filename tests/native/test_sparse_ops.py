"""Native kernels of all sparse ops, their function bodies in two stock runtimes, and the numpy references."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from sparse_ops import EXACT, OP_TYPES, Array, Call, assert_close, make_call, portable, session, tolerance

from onnxcomp import native
from onnxcomp.ops import GROUP, OPS, topk_matmul
from onnxcomp.rewrite import Context
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.lowering import NativeOps

pytest.importorskip("onnxruntime")

needs_library = pytest.mark.skipif(not native.available(), reason="the native library was not built")
INTEGER = [name for name in OP_TYPES if name.endswith(("Int8", "Int4"))]


def kernel(call: Call, threads: int = 1) -> Any:
    """A session that runs the call in the native library."""
    model = portable(call)
    edits = NativeOps().apply(model, Context(capabilities=OrtCpu().capabilities()))
    assert [e.action for e in edits] == ["applied"]
    return session(model, threads=threads)


def run(call: Call, threads: int = 1) -> Array:
    (y,) = kernel(call, threads).run(None, call.activations)
    return np.asarray(y)


# Around 4 inputs a pass, 64 a chunk, 16 or 64 columns a vector, 128 inputs a unit, 2048 columns a task.
SIZES = [(1, 1), (5, 17), (67, 40), (130, 95), (64, 2080), (259, 576)]


@needs_library
@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_kernel_equals_reference(op_type: str, k: int, n: int, exact: int) -> None:
    for variant, batch in enumerate([(1,), (3,), (2, 2), ()]):
        call = make_call(op_type, k, n, batch=batch, count=max(1, k // 3), variant=variant, f=k + 3, exact=exact)
        assert_close(run(call, threads=1 + variant % 2), call, tolerance(call))


@needs_library
@pytest.mark.parametrize("threshold", [0.2, 2.0])
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_a_large_batch(op_type: str, threshold: float) -> None:
    """Together its rows need all of the weight: fp32 has a dense product for that."""
    call = make_call(op_type, 300, 200, batch=(5, 9), threshold=threshold, count=150, f=270)
    assert_close(run(call, threads=2), call, tolerance(call))


@needs_library
@pytest.mark.parametrize("batch", [2, 3, 5, 8, 40])
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_rows_at_once_are_those_of_other_batches(op_type: str, batch: int) -> None:
    """Kernels for several rows read the weight once for all of them; no row depends on which the others are."""
    for variant in range(4):
        call = make_call(op_type, 150, 2080, batch=(batch,), count=60, variant=variant, f=130)
        y, names = run(call), set(call.activations) - {"threshold"}
        assert_close(y, call, tolerance(call))
        order = np.random.default_rng(variant).permutation(batch)
        turned = call.with_inputs(**{name: call.inputs[name][order] for name in names})
        part = call.with_inputs(**{name: call.inputs[name][-2:] for name in names})
        if op_type in INTEGER:  # float sums take their order from how much is kept
            np.testing.assert_array_equal(run(turned, threads=2), y[order])
            np.testing.assert_array_equal(run(part), y[-2:])


@needs_library
@pytest.mark.parametrize("suffix", ["", "Int8", "Int4"])
def test_weights_large_enough_for_huge_pages(suffix: str) -> None:
    call = make_call(f"ThresholdMatMul{suffix}", 1100, 9 * 1024, threshold=1.0)
    assert min(call.inputs["W"].nbytes, 4 << 20) == 4 << 20
    assert_close(run(call, threads=2), call, tolerance(call))


@needs_library
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_all_dropped_is_exactly_zero(op_type: str) -> None:
    call = make_call(op_type, 70, 64, threshold=np.inf)
    if "X" in call.inputs and op_type.startswith("TopK"):
        call = call.with_inputs(X=np.zeros((1, 70), np.float32))
    np.testing.assert_array_equal(run(call), np.zeros((1, 64), np.float32))


@needs_library
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_all_kept(op_type: str) -> None:
    call = make_call(op_type, 200, 96, threshold=-1.0, count=500)
    assert_close(run(call), call, tolerance(call))


@needs_library
@pytest.mark.parametrize("op_type", [name for name in OP_TYPES if not name.startswith("TopK")])
def test_one_sided_and_a_threshold_for_each(op_type: str) -> None:
    limits = np.random.default_rng(1).uniform(-0.5, 1, 130).astype(np.float32)
    one, two = (make_call(op_type, 130, 64, one_sided=side).with_inputs(threshold=limits) for side in (1, 0))
    assert_close(run(one), one, tolerance(one))
    assert_close(run(two), two, tolerance(two))
    assert np.abs(one.reference() - two.reference()).max() > 0.1


@needs_library
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_nan_and_infinity_reach_the_output(op_type: str, special: float) -> None:
    call = make_call(op_type, 70, 64, batch=(2,), count=9)
    name = "A" if "A" in call.inputs else "X"
    spoilt = call.inputs[name].copy()
    spoilt[1, 7] = special
    call = call.with_inputs(**{name: spoilt})
    y = run(call)
    assert np.isfinite(y[0]).all()
    with np.errstate(invalid="ignore"):
        expected = call.reference(np.float32)
    np.testing.assert_array_equal(np.isnan(y[1]), np.isnan(expected[1]))
    sound = ~np.isnan(expected[1])
    np.testing.assert_array_equal(y[1][sound], expected[1][sound])
    assert not np.isfinite(y[1]).any()


@needs_library
@pytest.mark.parametrize("special", [np.nan, np.inf, 1e32])
@pytest.mark.parametrize("batch", [2, 5, 40])
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_what_cannot_be_rounded_stays_in_its_row(op_type: str, batch: int, special: float) -> None:
    call = make_call(op_type, 70, 64, batch=(batch,), count=30)
    name, row = "A" if "A" in call.inputs else "X", batch // 2
    spoilt = call.inputs[name].copy()
    spoilt[row, 7] = special
    y, spoilt_y = run(call), run(call.with_inputs(**{name: spoilt}))
    assert np.isfinite(spoilt_y[row]).all() == np.isfinite(special)
    if op_type in INTEGER:  # float sums take their order from how much is kept
        others = np.arange(batch) != row
        np.testing.assert_array_equal(spoilt_y[others], y[others])
        names = set(call.activations) - {"threshold"}
        alone = call.with_inputs(**{n: (spoilt if n == name else call.inputs[n])[[row]] for n in names})
        np.testing.assert_array_equal(spoilt_y[[row]], run(alone))


@needs_library
@pytest.mark.parametrize("op_type", ["GatedMLP", "GatedMLPInt8", "GatedMLPInt4"])
def test_nan_in_the_input_of_an_mlp(op_type: str) -> None:
    call = make_call(op_type, 64, 64)
    spoilt = call.inputs["X"].copy()
    spoilt[0, 3] = np.nan
    assert np.isnan(run(call.with_inputs(X=spoilt))).all()


@needs_library
@pytest.mark.parametrize("op_type", INTEGER)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e20])
def test_an_outlier_does_not_take_the_bits_of_the_others(op_type: str, size: float) -> None:
    """The error is that of rounding each input relative to its like, whatever the magnitudes."""
    call = make_call(op_type, 320, 64, threshold=0.0, count=320)
    name = "A" if "A" in call.inputs else "X"
    values = call.inputs[name].copy()
    values[0, 5] *= 3000
    with_outlier = call.with_inputs(**{name: values * np.float32(size)})
    alone = np.zeros_like(values)
    alone[0, 5] = values[0, 5]
    rest = (run(with_outlier) - run(with_outlier.with_inputs(**{name: alone * np.float32(size)}))) / size
    values[0, 5] = 0
    others = call.with_inputs(**{name: values})
    # What is left of a difference of large numbers has their precision.
    slack = np.linalg.norm(with_outlier.reference()) / size * 2e-6
    error = np.linalg.norm(rest - others.reference())
    assert error <= tolerance(call) * np.linalg.norm(others.spread()) + slack


@needs_library
@pytest.mark.parametrize("suffix", ["", "Int8", "Int4"])
def test_of_equal_magnitudes_the_first_count(suffix: str) -> None:
    call = make_call(f"TopKMatMul{suffix}", 40, 32, count=5)
    signs = np.where(np.arange(40) % 2, -1, 1).astype(np.float32)
    signs[[3, 20]] *= 2
    call = call.with_inputs(X=signs[None])
    assert_close(run(call), call, tolerance(call))
    first = np.where(np.isin(np.arange(40), [0, 1, 2, 3, 20]), signs, 0)[None]
    np.testing.assert_allclose(call.reference(), call.with_inputs(X=first).reference(), rtol=1e-12)


def test_nan_counts_as_largest() -> None:
    x = np.array([[1, np.nan, np.inf, 2]])
    np.testing.assert_array_equal(topk_matmul(x, np.eye(4), k=2), topk_matmul(x, np.eye(4), k=2) * 1)
    kept = np.isnan(topk_matmul(x[:, :2], np.eye(2), k=1))
    assert kept.all(), "0 times NaN: the NaN was kept"


@pytest.mark.parametrize("opset", [16, 21])
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_body_in_stock_runtime_equals_reference(op_type: str, opset: int) -> None:
    for variant in range(4):
        attributes = {} if op_type.startswith("TopK") else {"one_sided": variant % 2}
        call = make_call(op_type, 33, 64, batch=(2, 2), count=9, variant=variant, f=21, **attributes)
        model = portable(call, opset=opset, output=64)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        (y,) = session(model).run(None, call.activations)
        assert_close(y, call, EXACT)


@pytest.mark.parametrize("op_type", OP_TYPES)
def test_body_in_the_reference_evaluator_equals_reference(op_type: str) -> None:
    # It does not know that function attributes have defaults.
    attributes = {} if op_type.startswith("TopK") else {"one_sided": 0}
    call = make_call(op_type, 9, 32, batch=(2,), count=4, variant=2, **attributes)
    (y,) = ReferenceEvaluator(ir.to_proto(portable(call))).run(None, call.activations)
    assert_close(y, call, EXACT)


@needs_library
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_output_shape_is_inferred(op_type: str) -> None:
    call = make_call(op_type, 64, 96)
    model = portable(call)
    for value in model.graph.inputs:
        if value.name in ("A", "X"):
            value.shape = ir.Shape(["batch", 5, 64])
    NativeOps().apply(model, Context(capabilities=OrtCpu().capabilities()))
    assert session(model).get_outputs()[0].shape == ["batch", 5, 96]


@needs_library
@pytest.mark.parametrize(
    ("op_type", "name", "shape", "message"),
    [
        ("ThresholdMatMulInt8", "W_scale", (3,), "one value for each column"),
        ("ThresholdMatMulInt4", "W_scale", (64, 1), "for each row and 32 columns"),
        ("ThresholdMatMulInt4", "W_zero_point", (2,), "a scalar or have the shape of the scale"),
        ("ThresholdMatMulInt4", "W", (64, 24), "a multiple of 32"),
        ("TopKMatMul", "X", (1, 63), "the last axis of X"),
        ("GatedMLPInt4", "A", (1, 63), "the last axis of A"),
        ("GatedMLPInt4", "X", (1, 63), "the last axis of X"),
        ("GatedMLPInt4", "X", (2, 64), "as many rows"),
        ("GatedMLPInt4", "threshold", (5,), "threshold has to be"),
    ],
)
def test_kernel_refuses_wrong_shapes(op_type: str, name: str, shape: tuple[int, ...], message: str) -> None:
    call = make_call(op_type, 64, 64)
    call = call.with_inputs(**{name: np.ones(shape, call.inputs[name].dtype)})
    model = portable(call)
    for value in model.graph.inputs:
        value.shape = None
    NativeOps().apply(model, Context(capabilities=OrtCpu().capabilities()))
    with pytest.raises(Exception, match=message):
        session(model).run(None, call.activations)


@needs_library
def test_kernel_refuses_wrong_types_and_attributes() -> None:
    call = make_call("ThresholdMatMulInt4", 64, 64)
    double = call.with_inputs(W_scale=call.inputs["W_scale"].astype(np.float64))
    with pytest.raises(Exception, match="float or float16"):
        run(double)
    with pytest.raises(Exception, match="k has to be at least 1"):
        run(make_call("TopKMatMul", 64, 64, count=0))


def test_every_op_is_documented_and_takes_32_columns_a_group() -> None:
    assert set(OPS) == set(OP_TYPES)
    assert GROUP == 32
    for name, op in OPS.items():
        assert op.function(16).name == name
        assert op.function(16).doc_string
