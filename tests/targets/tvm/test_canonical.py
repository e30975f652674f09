from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser

tvm = pytest.importorskip("tvm")

from tvm_harness import Compiled, lowered, machines  # noqa: E402

from onnxcomp.targets.tvm.lower.attention import Attention  # noqa: E402
from onnxcomp.targets.tvm.lower.canonical import Canonical  # noqa: E402
from onnxcomp.targets.tvm.lower.concats import Concats  # noqa: E402
from onnxcomp.targets.tvm.lower.matmuls import MatMuls  # noqa: E402
from onnxcomp.targets.tvm.nodes import DOMAIN  # noqa: E402

RNG = np.random.default_rng(0)
MACHINE = machines()[-1]
PASSES = (Canonical(), Attention(), MatMuls(), Concats())


def model(body: str, inputs: str, outputs: str, opset: int = 20, **weights: np.ndarray) -> ir.Model:
    parsed = parser.parse_model(
        f'<ir_version: 9, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    parsed.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return ir.from_proto(parsed)


def ours(lowered_model: ir.Model) -> Counter[str]:
    return Counter(n.op_type if n.domain == DOMAIN else f"onnx {n.op_type}" for n in lowered_model.graph)


def check(given: ir.Model, expected: dict[str, int], tolerance: float = 1e-5, **sizes: int) -> ir.Model:
    """Checks which nodes are left, and the values against ONNX Runtime."""
    after = lowered(given, PASSES)
    assert ours(after) == expected
    session = ort.InferenceSession(ir.to_proto(given).SerializeToString())
    feed = {
        i.name: RNG.standard_normal([sizes[d] if isinstance(d, str) else d for d in i.shape]).astype(np.float32)
        for i in session.get_inputs()
    }
    for mine, theirs in zip(Compiled(given, PASSES, MACHINE).run(feed), session.run(None, feed), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=tolerance, rtol=tolerance)
    return after


def numbers(**values: float) -> dict[str, np.ndarray]:
    return {k: np.array(v, np.float32) for k, v in values.items()}


GELU = numbers(root=2**0.5, one=1, half=0.5, inverse=0.5**0.5)
GELU_TANH = numbers(three=3, c=0.044715, s=0.7978846, one=1, half=0.5)


@pytest.mark.parametrize(
    ("kind", "body", "weights"),
    [
        ("gelu", "a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)", GELU),
        ("gelu", "a = Mul(x, inverse) b = Erf(a) c = Add(one, b) h = Mul(x, half) y = Mul(h, c)", GELU),
        ("gelu", "a = Mul(x, inverse) b = Erf(a) h = Mul(b, half) c = Add(h, half) y = Mul(c, x)", GELU),
        (
            "gelu_tanh",
            ("a = Pow(x, three) b = Mul(a, c) d = Add(x, b) e = Mul(d, s) t = Tanh(e) u = Add(t, one) "
            "h = Mul(x, half) y = Mul(h, u)"),
            GELU_TANH,
        ),
        (
            "gelu_tanh",
            ("a = Mul(x, x) b = Mul(a, x) f = Mul(c, b) d = Add(x, f) e = Mul(d, s) t = Tanh(e) u = Add(t, one) "
            "h = Mul(x, u) y = Mul(half, h)"),
            GELU_TANH,
        ),
        ("gelu", "y = Gelu(x)", {}),
        ("gelu_tanh", 'y = Gelu<approximate="tanh">(x)', {}),
        ("silu", "a = Sigmoid(x) y = Mul(x, a)", {}),
        ("silu", "m = Neg(x) e = Exp(m) p = Add(e, one) y = Div(x, p)", numbers(one=1)),
        ("hard_swish", "y = HardSwish(x)", {}),
        ("hard_swish", "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",
         numbers(three=3, zero=0, six=6)),
        ("hard_swish", "a = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(a, x)", {}),
        ("relu", "y = Relu(x)", {}),
        ("clip", "y = Clip(x, zero, six)", numbers(zero=0, six=6)),
        ("clip", "y = Clip(x, zero)", numbers(zero=0)),
        ("leaky_relu", "y = LeakyRelu<alpha=0.2>(x)", {}),
        ("hard_sigmoid", "y = HardSigmoid<alpha=0.3>(x)", {}),
        ("sigmoid", "y = Sigmoid(x)", {}),
        ("tanh", "y = Tanh(x)", {}),
    ],
)  # fmt: skip
def test_an_activation_is_one_node(kind, body, weights):
    after = lowered(model(body, "float[2,5,9] x", "float[2,5,9] y", **weights), PASSES)
    (node,) = after.graph
    assert (node.op_type, node.attributes["activation"].value) == ("Activate", kind)


def test_activations_compute_the_same():
    body = "a = Gelu(x) b = Tanh(a) s = Sigmoid(b) c = Mul(b, s) d = Clip(c, low) e = LeakyRelu(d) y = HardSwish(e)"
    given = model(body, "float[2,5,9] x", "float[2,5,9] y", **numbers(low=-0.2))
    check(given, {"Activate": 6})


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul(x, x) y = Add(a, x)",
        "a = Sigmoid(x) y = Mul(a, other)",
        "a = Erf(x) y = Mul(x, a)",
    ],
)
def test_what_is_no_activation_stays(body):
    given = model(body, "float[2,5] x, float[2,5] other", "float[2,5] y")
    assert all(
        n.op_type != "Activate" or n.attributes["activation"].value == "sigmoid" for n in lowered(given, PASSES).graph
    )


def test_an_activation_whose_parts_are_read_elsewhere_leaves_them():
    check(model("a = Sigmoid(x) y = Mul(x, a)", "float[3,7] x", "float[3,7] y, float[3,7] a"), {"Activate": 2})


VECTORS = {"scale": RNG.standard_normal(24).astype(np.float32), "bias": RNG.standard_normal(24).astype(np.float32)}
AXES = {"axes": np.array([-1]), **numbers(two=2, eps=1e-5, one=1, minus=-0.5)}


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("LayerNorm", "y = LayerNormalization<epsilon=0.001>(x, scale, bias)"),
        ("LayerNorm", ("m = ReduceMean(x, axes) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, axes) e = Add(v, eps) "
         "r = Sqrt(e) n = Div(d, r) s = Mul(n, scale) y = Add(s, bias)")),
        ("LayerNorm", ("m = ReduceMean(x, axes) d = Sub(x, m) f = Sub(x, m) q = Mul(f, f) v = ReduceMean(q, axes) "
         "e = Add(eps, v) r = Sqrt(e) n = Div(d, r) s = Mul(scale, n) y = Add(bias, s)")),
        ("RmsNorm",
         "q = Pow(x, two) v = ReduceMean(q, axes) e = Add(v, eps) r = Sqrt(e) n = Div(x, r) y = Mul(n, scale)"),
        ("RmsNorm", ("q = Mul(x, x) v = ReduceMean(q, axes) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) "
         "n = Mul(x, i) y = Mul(scale, n)")),
        ("RmsNorm", ("q = Mul(x, x) v = ReduceMean(q, axes) e = Add(v, eps) r = Sqrt(e) i = Div(one, r) n = Mul(x, i) "
         "y = Mul(scale, n)")),
        ("RmsNorm", "q = Mul(x, x) v = ReduceMean(q, axes) e = Add(v, eps) i = Pow(e, minus) y = Mul(i, x)"),
    ],
)  # fmt: skip
def test_a_norm_is_one_node(op, body):
    given = model(body, "float[2,5,24] x", "float[2,5,24] y", **VECTORS, **AXES)
    check(given, {op: 1}, tolerance=2e-5)


def test_a_norm_over_two_axes_and_any_number_of_rows():
    weights = {"scale": VECTORS["scale"].reshape(4, 6), "bias": VECTORS["bias"].reshape(4, 6)}
    body = "y = LayerNormalization<axis=-2>(x, scale, bias)"
    check(model(body, "float[N,4,6] x", "float[N,4,6] y", **weights), {"LayerNorm": 1}, N=5)


def test_softmax_takes_scale_and_mask():
    body = "a = Mul(x, eighth) b = Add(a, mask) y = Softmax(b)"
    given = model(body, "float[2,3,T,S] x, float[T,S] mask", "float[2,3,T,S] y", **numbers(eighth=0.125))
    check(given, {"Softmax": 1}, T=5, S=21)


def test_softmax_over_another_axis_stays():
    given = model("y = Softmax<axis=1>(x)", "float[2,3,4] x", "float[2,3,4] y")
    assert ours(lowered(given, PASSES)) == {"onnx Softmax": 1}


@pytest.mark.parametrize(
    "product", ["a = MatMul(x, w) b = Add(a, bias)", "b = Gemm(x, w, bias)", "b = Gemm<transB=1>(x, turned, bias)"]
)
def test_a_layer_scale_goes_into_the_weight(product):
    w = RNG.standard_normal((7, 24)).astype(np.float32)
    given = model(f"{product} y = Mul(b, scale)", "float[5,7] x", "float[5,24] y", w=w, turned=w.T.copy(), **VECTORS)
    after = lowered(given, [Canonical()])
    assert "onnx Mul" not in ours(after)
    x = RNG.standard_normal((5, 7)).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(after).SerializeToString())
    expected = (x @ w + VECTORS["bias"]) * VECTORS["scale"]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)


def test_a_scale_of_what_is_read_elsewhere_stays():
    w = RNG.standard_normal((7, 24)).astype(np.float32)
    given = model("a = MatMul(x, w) y = Mul(a, scale)", "float[5,7] x", "float[5,24] y, float[5,24] a", w=w, **VECTORS)
    assert ours(lowered(given, [Canonical()])) == {"onnx MatMul": 1, "onnx Mul": 1}


@pytest.mark.parametrize("tokens", ["19", "T"])
def test_attention_with_transposes_is_one_node(tokens):
    body = """
        q = Reshape(x, heads) qt = Transpose<perm=[0,2,1,3]>(q) qs = Mul(qt, eighth)
        kt = Transpose<perm=[0,2,3,1]>(q) s = MatMul(qs, kt) p = Softmax(s)
        o = MatMul(p, qt) ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, joined)
    """
    weights = {"heads": np.array([0, 0, 2, 16]), "joined": np.array([0, 0, 32]), **numbers(eighth=0.125)}
    given = model(body, f"float[1,{tokens},32] x", f"float[1,{tokens},32] y", **weights)
    check(given, {"Attention": 1, "onnx Reshape": 2}, T=13)


def test_attention_of_heads_that_share_keys_with_a_cache():
    body = """
        qs = Mul(q, eighth) g = Reshape(qs, grouped) keys = Concat<axis=2>(past, k) kt = Transpose<perm=[0,1,3,2]>(keys)
        s = MatMul(g, kt) a = Reshape(s, apart) m = Add(a, mask) p = Softmax(m) j = Reshape(p, together)
        y = MatMul(j, keys)
    """
    weights = {
        "grouped": np.array([1, 2, 6, 16]),
        "apart": np.array([1, 2, 3, 2, 11]),
        "together": np.array([1, 2, 6, 11]),
        **numbers(eighth=0.125),
    }
    inputs = "float[1,6,2,16] q, float[1,2,9,16] past, float[1,2,2,16] k, float[2,11] mask"
    check(model(body, inputs, "float[1,2,6,16] y", **weights), {"Attention": 1, "Concat": 1, "onnx Reshape": 1})


def test_products_of_activations_take_transposes_and_factors():
    body = "a = Mul(x, half) t = Transpose<perm=[0,2,1]>(w) y = MatMul(a, t)"
    given = model(body, "float[3,M,K] x, float[1,N,K] w", "float[3,M,N] y", **numbers(half=0.5))
    check(given, {"MatMul": 1}, M=9, K=21, N=35)


def test_a_mask_in_the_middle_of_attention_leaves_products():
    body = "s = MatMul(q, k) w = Where(c, s, low) p = Softmax(w) y = MatMul(p, v)"
    inputs = "float[2,3,5,8] q, float[2,3,8,7] k, float[2,3,7,8] v"
    weights = {"c": RNG.random((5, 7)) < 0.7, **numbers(low=-1e9)}
    check(model(body, inputs, "float[2,3,5,8] y", **weights), {"MatMul": 2, "Softmax": 1, "onnx Where": 1})


@pytest.mark.parametrize("past", ["11", "P"])
def test_a_cache_grows_by_a_kernel(past):
    given = model("y = Concat<axis=-2>(a, b)", f"float[2,3,{past},9] a, float[2,3,1,9] b", "float[2,3,Q,9] y")
    check(given, {"Concat": 1}, P=5)
