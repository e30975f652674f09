"""Small models of every kind, in the forms that exporters write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from builder import Builder
from onnx import TensorProto, helper

WIDTH, HEADS, TOKENS, VOCABULARY = 32, 2, 12, 96
SIZE = WIDTH // HEADS


def linear(b: Builder, x: str, inputs: int, outputs: int, name: str = "") -> str:
    return b.op("MatMul", x, b.const((b.rng.normal(size=(inputs, outputs)) * 0.1).astype(np.float32)), name=name)


def attend(b: Builder, q: str, k: str, v: str, mask: str = "", form: str = "plain") -> str:
    """Attention of (1, heads, tokens, size), `mask` is added to the scores."""
    if form == "einsum":
        scores = b.op("Einsum", q, k, equation="bhqd,bhkd->bhqk")
    else:
        scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.op("Div", scores, b.const(np.float32(SIZE**0.5)))
    if mask:
        scores = b.op("Add", scores, mask)
    if form == "qdq":
        scores = b.qdq(scores)
    weights = b.op("Softmax", scores, axis=-1)
    if form == "guarded":  # what scaled_dot_product_attention is decomposed into
        weights = b.op("Where", b.op("IsNaN", weights), b.const(np.float32(0)), weights)
    return b.op("MatMul", b.qdq(weights) if form == "qdq" else weights, v)


def block(b: Builder, x: str, mask: str = "", form: str = "plain", past: Sequence[str] = ()) -> tuple[str, list[str]]:
    """One layer of attention and MLP; also the keys and values behind `past`."""
    shape = b.const(np.array([1, -1, HEADS, SIZE]))
    q, k, v = (
        b.op("Transpose", b.op("Reshape", linear(b, x, WIDTH, WIDTH), shape), perm=[0, 2, 1, 3]) for _ in range(3)
    )
    if past:
        k, v = (b.op("Concat", old, new, axis=2) for old, new in zip(past, (k, v), strict=True))
    y = b.op("Transpose", attend(b, q, k, v, mask, form), perm=[0, 2, 1, 3])
    y = linear(b, b.op("Reshape", y, b.const(np.array([1, -1, WIDTH]))), WIDTH, WIDTH)
    x = b.op("Add", x, y)
    y = b.op("Relu", linear(b, x, WIDTH, 4 * WIDTH))
    return b.op("Add", x, linear(b, y, 4 * WIDTH, WIDTH)), [k, v]


def embedded(b: Builder) -> tuple[str, str]:
    """Token ids looked up in a table; also the table."""
    table = b.floats(VOCABULARY, WIDTH)
    return b.op("Gather", table, b.input("ids", [1, TOKENS], TensorProto.INT64)), table


def causal_mask(b: Builder, form: str) -> str:
    """A mask that hides the tokens to come, added to the scores."""
    low, zero = b.const(np.float32(-1e9)), b.const(np.float32(0))
    if form == "constant":
        return b.const(np.triu(np.full((1, 1, TOKENS, TOKENS), -1e9, np.float32), 1))
    if form == "trilu":
        return b.op("Trilu", b.const(np.full((TOKENS, TOKENS), -1e9, np.float32)), b.const(np.int64(1)), upper=1)
    places = b.op("Range", b.const(np.int64(0)), b.const(np.int64(TOKENS)), b.const(np.int64(1)))
    rows = b.op("Unsqueeze", places, b.const(np.array([1])))
    return b.op("Where", b.op("Greater", places, rows), low, zero)


def decoder(mask: str = "trilu", form: str = "plain", tied: bool = True, logits: bool = True) -> ir.Model:
    b = Builder()
    x, table = embedded(b)
    x, _ = block(b, x, causal_mask(b, mask), form)
    if not logits:
        return b.output(linear(b, x, WIDTH, 2)).model()
    head = b.op("Transpose", table, perm=[1, 0]) if tied else b.floats(WIDTH, VOCABULARY)
    return b.output(b.op("MatMul", x, head, name="logits")).model()


def cached(embeddings: bool = False) -> ir.Model:
    """A decoder whose keys and values are inputs and outputs; with `embeddings`, tokens come looked up."""
    b = Builder()
    vocabulary = 5000 if embeddings else VOCABULARY
    x = b.input("x", [1, "t", WIDTH]) if embeddings else embedded(b)[0]
    past = [b.input(name, [1, HEADS, "p", SIZE]) for name in ("a", "b")]
    x, present = block(b, x, past=past)
    b.output(linear(b, x, WIDTH, vocabulary))
    for value in present:
        b.output(value)
    return b.model()


def grouped() -> ir.Model:
    """A decoder with onnxruntime's fused attention."""
    b = Builder()
    x, _ = embedded(b)
    q, k, v = (linear(b, x, WIDTH, WIDTH) for _ in range(3))
    past = [b.input(name, [1, HEADS, "p", SIZE]) for name in ("a", "b")]
    lengths = [b.const(np.array([TOKENS - 1], np.int32)), b.const(np.int32(TOKENS))]
    outputs = ["y", "present_a", "present_b"]
    attributes = {"num_heads": HEADS, "kv_num_heads": HEADS, "domain": "com.microsoft"}
    b.nodes.append(helper.make_node("GroupQueryAttention", [q, k, v, *past, *lengths], outputs, **attributes))
    b.output(linear(b, "y", WIDTH, VOCABULARY))
    return b.output("present_a").output("present_b").model()


def encoder(form: str = "plain", tokens: bool = True) -> ir.Model:
    """BERT or ViT, with a class behind."""
    b = Builder()
    if tokens:
        x, _ = embedded(b)
    else:
        image = b.op("Conv", b.input("x", [1, 3, 16, 16]), b.floats(WIDTH, 3, 4, 4), strides=[4, 4])
        x = b.op("Transpose", b.op("Reshape", image, b.const(np.array([1, WIDTH, -1]))), perm=[0, 2, 1])
    if form in ("Attention", "MultiHeadAttention"):
        y = linear(b, x, WIDTH, 3 * WIDTH)
        y = b.op(form, y, b.floats(3 * WIDTH, 3 * WIDTH), domain="com.microsoft", num_heads=HEADS)
    else:
        y, _ = block(b, x, form=form)
    return b.output(linear(b, b.op("ReduceMean", y, axes=[1]), WIDTH, 2)).model()


def cnn(quantized: bool = False) -> ir.Model:
    b = Builder()
    if quantized:
        y = b.conv(b.qdq(b.conv(b.image())), name="second")
    else:
        y = b.op("Conv", b.input("x", [1, 3, 16, 16]), b.floats(8, 3, 3, 3), name="first")
        y = b.op("Conv", b.op("Relu", y), b.floats(8, 8, 3, 3), name="second")
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    return b.output(b.op("Gemm", y, b.floats(8, 5), name="classify")).model()


def recognizer(attention: bool = True, kernel: int = 3) -> ir.Model:
    """Convolutions, then attention or an LSTM over the columns."""
    b = Builder()
    y = b.op("Conv", b.input("x", [1, 3, 16, "w"]), b.floats(WIDTH, 3, 3, 3))
    y = b.op("Conv", b.op("Relu", y), b.floats(WIDTH, WIDTH, kernel, kernel))
    y = b.op("Squeeze", b.op("ReduceMean", y, axes=[2]), b.const(np.array([2])))
    if attention:
        y, _ = block(b, b.op("Transpose", y, perm=[0, 2, 1]))
    else:
        y = lstm(b, b.op("Transpose", y, perm=[2, 0, 1]), WIDTH)
    return b.output(linear(b, y, WIDTH, 10)).model()


def lstm(b: Builder, x: str, inputs: int, states: Sequence[str] = (), op_type: str = "LSTM") -> str:
    """A recurrent layer; with `states`, its new states are outputs."""
    gates = {"LSTM": 4, "GRU": 3}[op_type] * WIDTH
    weights = [b.floats(1, gates, inputs), b.floats(1, gates, WIDTH), b.floats(1, 2 * gates)]
    outputs = ["y", *(f"new_{s}" for s in states)]
    given = [x, *weights, "", *states] if states else [x, *weights]
    b.nodes.append(helper.make_node(op_type, given, outputs, name="recurrent", hidden_size=WIDTH))
    for state in outputs[1:]:
        b.outputs.append(helper.make_tensor_value_info(state, TensorProto.FLOAT, [1, 1, WIDTH]))
    return b.op("Squeeze", "y", b.const(np.array([1])))


def streaming(op_type: str = "LSTM") -> ir.Model:
    b = Builder()
    x = b.input("x", [4, 1, WIDTH])
    states = [b.input(s, [1, 1, WIDTH]) for s in (("h", "c") if op_type == "LSTM" else ("h",))]
    return b.output(linear(b, lstm(b, x, WIDTH, states, op_type), WIDTH, 3)).model()


def recurrent() -> ir.Model:
    b = Builder()
    return b.output(linear(b, lstm(b, b.input("x", [4, 1, WIDTH]), WIDTH), WIDTH, 3)).model()


def scanned() -> ir.Model:
    """A cell in a Scan, whose state goes in and out."""
    return ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] h, float[4, 2] x) => (float[2] h_out, float[4, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}> {
            h_out, y = Scan <num_scan_inputs = 1, body = step (float[2] s, float[2] e) => (float[2] t, float[2] o) {
                a = MatMul(s, w)
                t = Add(a, e)
                o = Identity(t)
            }> (h, x)
        }""")


def accumulator() -> ir.Model:
    """A loop with state that has no layer."""
    return ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] h, float[4, 2] x) => (float[2] h_out, float[4, 2] y) {
            h_out, y = Scan <num_scan_inputs = 1, body = step (float[2] s, float[2] e) => (float[2] t, float[2] o) {
                t = Add(s, e)
                o = Identity(t)
            }> (h, x)
        }""")


def similarity() -> ir.Model:
    """A softmax over similarities that weighs nothing is no attention."""
    b = Builder()
    x, y = (linear(b, b.input(name, ["n", WIDTH]), WIDTH, WIDTH) for name in "xy")
    return b.output(b.op("Softmax", b.op("MatMul", x, b.op("Transpose", y, perm=[1, 0])))).model()


def mlp() -> ir.Model:
    b = Builder()
    return b.output(linear(b, b.op("Relu", linear(b, b.input("x", [1, 8]), 8, 32)), 32, 4)).model()


def pooling() -> ir.Model:
    """A softmax that weighs time steps of a CNN is no attention between tokens."""
    b = Builder()
    y = b.op("Conv", b.input("x", [1, 8, 30]), b.floats(WIDTH, 8, 3))
    scores = b.op("Softmax", linear(b, b.op("Transpose", y, perm=[0, 2, 1]), WIDTH, 1), axis=1)
    return b.output(b.op("MatMul", y, scores)).model()


KINDS: dict[str, list[tuple[str, Callable[[], ir.Model]]]] = {
    "cnn": [("float", cnn), ("quantized", lambda: cnn(quantized=True)), ("pooling", pooling)],
    "transformer-encoder": [
        *((f, lambda f=f: encoder(f)) for f in ("plain", "einsum", "qdq", "guarded", "Attention")),
        ("vit", lambda: encoder(tokens=False)),
    ],
    "decoder-lm": [
        *((m, lambda m=m: decoder(m)) for m in ("constant", "trilu", "range")),
        ("untied", lambda: decoder(tied=False)),
        ("reward", lambda: decoder(logits=False)),
        ("cached", cached),
        ("embeddings", lambda: cached(embeddings=True)),
        ("grouped", grouped),
    ],
    "recurrent-streaming": [("lstm", streaming), ("gru", lambda: streaming("GRU")), ("scan", scanned)],
    "recurrent": [("lstm", recurrent)],
    "mixed": [
        ("attention", recognizer),
        ("lstm", lambda: recognizer(attention=False)),
        ("long lstm", lambda: recognizer(False, 1)),
    ],
    "other": [("mlp", mlp), ("accumulator", accumulator), ("similarity", similarity)],
}
