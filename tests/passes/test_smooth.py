"""Smoothing changes no output in float, and touches only what every reader can undo."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.metrics import sqnr
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.smooth import Smooth
from onnxcomp.select import Select

CHANNELS = 16
OUTLIERS = np.where(np.arange(CHANNELS) % 7 == 3, 40.0, 1.0).astype(np.float32)


def details(report, action: str) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == action}


def feeds(*shape: int, count: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=shape).astype(np.float32)} for _ in range(count)]


def exact(model: ir.Model, data, run_passes, outputs, **config):
    """Smooths the model, checks that it still computes the same, and returns the report."""
    before = outputs(model, data[0])
    report = run_passes(model, Smooth(rows=64, **config), data=data)
    after = outputs(model, data[0])
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * np.abs(x).max())
    return report


def small(b: Builder, *shape: int) -> str:
    return b.const((b.rng.normal(size=shape) * 0.3).astype(np.float32))


def reader(b: Builder, outputs: int) -> np.ndarray:
    """Weight `(CHANNELS, outputs)`, small where the activation is large, as in trained networks."""
    return (b.rng.normal(size=(CHANNELS, outputs)) / OUTLIERS[:, None]).astype(np.float32)


def gamma(b: Builder, *shape: int) -> str:
    return b.const((OUTLIERS * b.rng.uniform(0.5, 1.5, CHANNELS)).astype(np.float32).reshape(shape or (CHANNELS,)))


def moments(b: Builder, x: str, *, centre: bool) -> str:
    """The part of a decomposed LayerNorm (or RMS norm) before gamma."""
    if centre:
        x = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    square = b.op("ReduceMean", b.op("Pow", x, b.const(np.float32(2))), axes=[-1])
    return b.op("Div", x, b.op("Sqrt", b.op("Add", square, b.const(np.float32(1e-6)))))


def norm(b: Builder, kind: str) -> str:
    x = b.input("x", [1, 12, CHANNELS])
    if kind == "LayerNormalization":
        return b.op(kind, x, gamma(b), b.floats(CHANNELS), name="norm")
    if kind == "without beta":
        return b.op("LayerNormalization", x, gamma(b), name="norm")
    if kind == "RMSNormalization":
        return b.op(kind, x, gamma(b), name="norm")
    if kind == "decomposed":
        scaled = b.op("Mul", gamma(b), moments(b, x, centre=True), name="gamma")
        return b.op("Add", scaled, b.floats(1, 1, CHANNELS), name="beta")
    return b.op("Mul", moments(b, x, centre=False), gamma(b, 1, 1, CHANNELS), name="gamma")


def gain(model: ir.Model, data, run_passes, outputs) -> float:
    """What smoothing adds to the SQNR of the quantized model, in dB, on a feed that calibration did not see."""
    unseen = feeds(*data[0]["x"].shape, count=1, seed=9)[0]
    expected = outputs(model, unseen)[0]
    found = []
    for passes in ([Quantize()], [Smooth(rows=64), Quantize()]):
        changed = model.clone()
        run_passes(changed, *passes, data=data)
        found.append(sqnr(expected, outputs(changed, unseen)[0]))
    return found[1] - found[0]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("LayerNormalization", "LayerNormalization gamma"),
        ("without beta", "LayerNormalization gamma"),
        ("RMSNormalization", "RMSNormalization gamma"),
        ("decomposed", "constant of a Mul"),
        ("decomposed RMS norm", "constant of a Mul"),
    ],
)
def test_a_norm_takes_the_scale(kind, place, b, run_passes, outputs):
    y = norm(b, kind)
    for i in range(2):
        b.output(b.op("Add", b.op("MatMul", y, b.const(reader(b, 8)), name=f"fc{i}"), b.floats(8)))
    model, data = b.model(opset=23 if kind == "RMSNormalization" else 17), feeds(1, 12, CHANNELS)
    assert gain(model, data, run_passes, outputs) > 5.0
    report = exact(model, data, run_passes, outputs)
    found = details(report, "applied")
    assert set(found) == {"fc0", "fc1"}
    assert all(place in text for text in found.values())
    assert ("centred" in found["fc0"]) <= (kind in ("LayerNormalization", "without beta", "decomposed"))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm(transposed, bias, b, run_passes, outputs):
    y = b.op("LayerNormalization", b.input("x", [12, CHANNELS]), gamma(b), b.floats(CHANNELS))
    weight = reader(b, 8)
    y = b.op(
        "Gemm",
        y,
        b.const(weight.T if transposed else weight),
        *([b.floats(8)] if bias else []),
        name="fc",
        transB=transposed,
    )
    model, data = b.output(y).model(), feeds(12, CHANNELS)
    assert gain(model, data, run_passes, outputs) > 3.0
    report = exact(model, data, run_passes, outputs)
    assert bias or "centred" not in details(report, "applied")["fc"], "a shift would need a bias"


@pytest.mark.parametrize("method", ["smoothquant", "repq", "best"])
def test_attention_passes_the_scale_of_the_values(method, attention_example, run_passes, outputs):
    """One fused projection for query, key and value; its columns of values take the scale, the others stay."""
    model, _ = attention_example
    weight, behind = (next(n for n in model.graph if n.name == name).inputs[1] for name in ("qkv", "proj"))
    array = weight.const_value.numpy().copy()
    array[:, 32:] *= OUTLIERS
    weight.const_value = ir.tensor(array, name=weight.name)
    behind.const_value = ir.tensor(behind.const_value.numpy() / OUTLIERS[:, None], name=behind.name)
    report = exact(model, feeds(1, 12, 16), run_passes, outputs, method=method)
    assert "columns of qkv" in details(report, "applied")["proj"]
    assert "explicit" in details(report, "refused")["fc2"]
    changed = next(n for n in model.graph if n.name == "qkv").inputs[1].const_value.numpy()
    scale = changed / array
    np.testing.assert_allclose(scale[:, :32] / scale[:, :1], np.ones((16, 32)), rtol=1e-5)
    assert np.ptp(scale[0, 32:]) > 0.1


def grouped(b: Builder, *, queries: int = 4, keys: int = 2, width: int = 4) -> ir.Model:
    """Attention in which `queries // keys` heads share keys and values, repeated by Unsqueeze, Expand and Reshape."""
    x = b.input("x", [1, 6, CHANNELS])

    def heads(name: str, count: int) -> str:
        y = b.op("Add", b.op("MatMul", x, small(b, CHANNELS, count * width), name=name), b.floats(count * width))
        y = b.op("Transpose", b.op("Reshape", y, b.const(np.array([1, 6, count, width]))), perm=[0, 2, 1, 3])
        if count == queries:
            return y
        y = b.op("Unsqueeze", y, b.const(np.array([2])))
        y = b.op("Expand", y, b.const(np.array([1, count, queries // count, 6, width])))
        return b.op("Reshape", y, b.const(np.array([1, queries, 6, width])))

    q, k, v = heads("q", queries), heads("k", keys), heads("v", keys)
    weights = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    y = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    y = b.op("Reshape", y, b.const(np.array([1, 6, queries * width])))
    return b.output(b.op("Add", b.op("MatMul", y, small(b, queries * width, 8), name="proj"), b.floats(8))).model()


def test_grouped_queries_share_a_scale(b, run_passes, outputs):
    model = grouped(b)
    v = next(n for n in model.graph if n.name == "v").inputs[1]
    array = v.const_value.numpy() * np.array([30, 1, 1, 1, 1, 1, 9, 1], np.float32)
    v.const_value = ir.tensor(array, name=v.name)
    report = exact(model, feeds(1, 6, CHANNELS), run_passes, outputs)
    assert "columns of v" in details(report, "applied")["proj"]


@pytest.mark.parametrize("kind", ["Relu", "LeakyRelu", "gate"])
def test_layers_pass_a_scale_through_what_is_homogeneous(kind, b, run_passes, outputs):
    x = b.input("x", [4, 8])
    weight = b.const((b.rng.normal(size=(8, CHANNELS)) * OUTLIERS).astype(np.float32))
    y = b.op("Add", b.op("MatMul", x, weight, name="up"), b.floats(CHANNELS))
    if kind == "gate":
        gate = b.op("MatMul", x, small(b, 8, CHANNELS), name="gate")
        y = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), y, name="product")
    else:
        y = b.op(kind, y)
    model = b.output(b.op("MatMul", y, b.const(reader(b, 4)), name="down")).model()
    data = feeds(4, 8, count=16)
    assert gain(model, data, run_passes, outputs) > 3.0
    report = exact(model, data, run_passes, outputs)
    assert "columns of up" in details(report, "applied")["down"]


def test_a_gelu_takes_an_explicit_scale_only(b, run_passes, outputs):
    x = b.input("x", [64, 8])
    weight = b.const((b.rng.normal(size=(8, CHANNELS)) * OUTLIERS).astype(np.float32))
    y = b.op("Gelu", b.op("Add", b.op("MatMul", x, weight, name="fc1"), b.floats(CHANNELS)), name="gelu")
    model = b.output(b.op("MatMul", y, b.const(reader(b, 4)), name="fc2")).model(opset=20)
    data = feeds(64, 8)
    report = exact(model.clone(), data, run_passes, outputs)
    assert "comes from Gelu" in details(report, "refused")["fc2"]
    report = exact(model, data, run_passes, outputs, explicit=True, explicit_gain=0.2)
    assert "explicit Mul" in details(report, "applied")["fc2"]
    assert sum(n.op_type == "Mul" for n in model.graph) == 1


def test_a_second_application_changes_nothing(attention_example, run_passes):
    model, _ = attention_example
    data = feeds(1, 12, 16)
    assert run_passes(model, Smooth(rows=64), data=data).applied
    once = ir.to_onnx_text(model)
    report = run_passes(model, Smooth(rows=64), data=data)
    assert not report.applied
    assert "already" in details(report, "refused")["qkv"]
    assert ir.to_onnx_text(model) == once


def test_where(attention_example, run_passes, outputs):
    model, _ = attention_example
    report = exact(model, feeds(1, 12, 16), run_passes, outputs, where=Select(name=("fc1",)))
    assert {e.node for e in report.edits} == {"fc1"}


@pytest.mark.parametrize("bias", [True, False])
def test_massive_channels_of_a_token_are_taken_apart(bias, b, run_passes, outputs):
    """Two of 32 channels are massive, and matter for every token, so that no scale spares both sides."""
    x = b.input("x", [1, 64, 8])
    up = b.rng.normal(size=(8, 32)).astype(np.float32)
    up[0], up[0, [5, 20]] = 0.0, (90.0, -70.0)
    y = b.op("Gelu", b.op("Add", b.op("MatMul", x, b.const(np.abs(up)), name="fc1"), b.floats(32)), name="gelu")
    y = b.op("MatMul", y, b.floats(32, 6), name="fc2")
    y = b.op("Add", y, b.floats(6)) if bias else y
    model = b.output(b.op("Mul", y, b.floats(6))).model(opset=20)
    data = feeds(1, 64, 8, count=12)
    for feed in data:
        feed["x"][:, :, 0] *= 0.02
        feed["x"][:, 7, 0] = 1.0
    plain = model.clone()
    expected = outputs(model, data[0])[0]
    smooth = Smooth(rows=704, explicit=True, explicit_gain=0.3)
    report = run_passes(model, smooth, data=data[1:])
    np.testing.assert_allclose(outputs(model, data[0])[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert ("channels apart" in details(report, "applied").get("fc2", "")) == bias
    if bias:
        product = next(n for n in model.graph if n.op_type == "Einsum")
        np.testing.assert_array_equal(product.inputs[0].producer().inputs[1].const_value.numpy(), [5, 20])
        assert not run_passes(model, smooth, data=data[1:]).applied
        found = []
        for changed in (plain, model):
            run_passes(changed, Quantize(), data=data[1:])
            found.append(sqnr(expected[:, 8:], outputs(changed, data[0])[0][:, 8:]))
        assert found[1] > found[0] + 6.0
