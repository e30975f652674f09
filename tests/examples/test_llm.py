"""The decoder example on a small GGUF file that the test writes, against the same network in numpy."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from examples.llm.gguf import GgufFile
from examples.llm.model import build, smollm2_weights
from examples.llm.session import Decoder, wikitext
from examples.llm.tokenizer import Tokenizer
from onnxcomp.model import save
from onnxcomp.passes.awq import Awq
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import OrtCpu, reference_runner

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 2, 64, 4, 2, 96, 280
SIZE, THETA, EPSILON = WIDTH // HEADS, 1e4, 1e-5
CONTROL = ["<end>", "<start>"]


def printable() -> list[str]:
    """Characters that stand for bytes in GPT-2's vocabulary: those that print for themselves."""
    prints = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in prints]
    return [chr(b) if b in prints else chr(256 + others.index(b)) for b in range(256)]


MERGES = ["h e", "l l", "he ll", "Ġ w", "hell o"]
TOKENS = CONTROL + printable() + ["he", "ll", "hell", "Ġw", "hello"]
TOKENS += [f"unused{i}" for i in range(VOCABULARY - len(TOKENS))]


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(value: object) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    assert isinstance(value, list)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + np.array(value, "<i4").tobytes()


def write(path: Path, metadata: dict[str, object], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> None:
    """A GGUF file; a tensor is its type, its shape and its data."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(text(k) + entry(v) for k, v in metadata.items())
    offset, body = 0, b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
        body += data + b"\0" * (-len(data) % 32)
        offset = len(body)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)


def metadata() -> dict[str, object]:
    return {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": THETA,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
    }


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    def gain() -> np.ndarray:
        return random.uniform(0.5, 1.5, WIDTH).astype(np.float32)

    found = {"token_embd.weight": 4 * matrix(VOCABULARY, WIDTH), "output_norm.weight": gain()}
    for i in range(LAYERS):
        shapes = {"attn_q": WIDTH, "attn_k": SIZE * KV_HEADS, "attn_v": SIZE * KV_HEADS, "attn_output": WIDTH}
        found |= {f"blk.{i}.{n}.weight": 2 * matrix(rows, WIDTH) for n, rows in shapes.items()}
        found |= {f"blk.{i}.{n}.weight": matrix(HIDDEN, WIDTH) for n in ("ffn_gate", "ffn_up")}
        found |= {f"blk.{i}.ffn_down.weight": matrix(WIDTH, HIDDEN)}
        found |= {f"blk.{i}.{n}.weight": gain() for n in ("attn_norm", "ffn_norm")}
    return found


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> GgufFile:
    path = tmp_path_factory.mktemp("llm") / "small.gguf"
    write(path, metadata(), {n: (0, w.shape, w.tobytes()) for n, w in weights().items()})
    return GgufFile(path)


@pytest.fixture(scope="module")
def model_path(gguf, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llm") / "small.onnx"
    save(build(gguf), path)
    return path


def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * gain


def rotate(x: np.ndarray) -> np.ndarray:
    """As GGUF stores it: neighbours (2i, 2i + 1) turn by position * theta**(-2i / size); x is (T, heads, size)."""
    angles = np.arange(len(x))[:, None, None] * THETA ** (-np.arange(0, SIZE, 2) / SIZE)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def reference(tokens: list[int]) -> np.ndarray:
    """Logits in float64, query head by query head."""
    w = {name.removesuffix(".weight"): value.astype(np.float64) for name, value in weights().items()}
    x, count = w["token_embd"][tokens], len(tokens)
    for i in range(LAYERS):
        block = f"blk.{i}"
        y = norm(x, w[f"{block}.attn_norm"])
        q, k, v = ((y @ w[f"{block}.attn_{n}"].T).reshape(count, -1, SIZE) for n in "qkv")
        q, k = rotate(q), rotate(k)
        heads = []
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            scores = q[:, head] @ k[:, group].T / np.sqrt(SIZE)
            scores[np.triu_indices(count, 1)] = -np.inf
            share = np.exp(scores - scores.max(axis=-1, keepdims=True))
            heads.append(share / share.sum(axis=-1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(heads, axis=-1) @ w[f"{block}.attn_output"].T
        y = norm(x, w[f"{block}.ffn_norm"])
        gate = y @ w[f"{block}.ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[f"{block}.ffn_up"].T)) @ w[f"{block}.ffn_down"].T
    return norm(x, w["output_norm"]) @ w["token_embd"].T


TOKEN_NUMBERS = np.random.default_rng(7).integers(0, VOCABULARY, 21).tolist()


@pytest.mark.parametrize(
    "cuts", [(), (1,), (7, 8), tuple(range(1, 21))], ids=["at once", "1+20", "7+1+13", "one by one"]
)
def test_decoder_equals_numpy_with_and_without_cache(cuts, model_path):
    decoder = Decoder(model_path)
    ends = (0, *cuts, len(TOKEN_NUMBERS))
    parts = [decoder.run(TOKEN_NUMBERS[a:b]) for a, b in pairwise(ends)]
    expected = reference(TOKEN_NUMBERS)
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("window", "stride"), [(6, 6), (6, 3), (6, 1), (50, 50)])
def test_every_token_is_scored_once(window, stride, model_path):
    """From at least `window - stride` tokens before it, as far as there are so many, and at most `window`."""
    found = np.concatenate(list(Decoder(model_path).log_likelihoods(TOKEN_NUMBERS, window, stride)))
    assert len(found) == len(TOKEN_NUMBERS) - 1
    start = 0
    for at, value in enumerate(found, start=1):
        while at > start + window:
            start += stride
        logits = reference(TOKEN_NUMBERS[start:at])[-1]
        assert value == pytest.approx(logits[TOKEN_NUMBERS[at]] - np.logaddexp.reduce(logits), abs=1e-3)


@pytest.mark.parametrize(
    ("bits", "form", "tolerance"), [(8, "matmulnbits", 0.04), (8, "qdq", 0.04), (4, "matmulnbits", 0.6)]
)
def test_weight_only_keeps_the_tie_and_the_function(bits, form, tolerance, gguf, tmp_path):
    model = build(gguf)
    step = WeightOnly(bits=bits, form=form, min_weights=0)
    (report,) = Pipeline(passes=[step], capabilities=OrtCpu().capabilities()).run(model)
    done = {e.node for e in report.edits if e.action == "applied"}
    assert {"embed", "lm_head", "layers.1.mlp.down"} <= done
    floats = [v for v in model.graph.initializers.values() if v.dtype.is_floating_point() and "scale" not in v.name]
    assert max(v.const_value.size for v in floats) <= WIDTH
    save(model, tmp_path / "small.onnx")
    found, expected = Decoder(tmp_path / "small.onnx").run(TOKEN_NUMBERS), reference(TOKEN_NUMBERS)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def windows(count: int) -> list[dict[str, np.ndarray]]:
    names, random = [f"past_{kind}.{i}" for i in range(LAYERS) for kind in ("key", "value")], np.random.default_rng(3)
    cache = dict.fromkeys(names, np.zeros((1, KV_HEADS, 0, SIZE), np.float32))
    return [{"input_ids": random.integers(0, VOCABULARY, (1, 40)), **cache} for _ in range(count)]


def test_awq_changes_neither_logits_nor_cache(gguf):
    """The value projection stays, since the cache shows it; the norms and the gated layers are scaled."""
    model = build(gguf)
    pipeline = Pipeline(passes=[Awq(rows=64)], capabilities=OrtCpu().capabilities(), runner=reference_runner)
    names, feed = [v.name for v in model.graph.outputs], windows(5)[-1]
    before = reference_runner(model, names)(feed)
    done = {e.node for e in pipeline.run(model, windows(4))[0].edits if e.action == "applied"}
    assert {"layers.0.attn.q", "layers.1.mlp.down"} <= done
    assert not {n for n in done if n.endswith(("attn.out", "lm_head"))}
    after = reference_runner(model, names)(feed)
    for name in names:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=2e-5 * np.abs(before[name]).max())


def test_gptq_keeps_the_tie_and_is_closer_than_rounding_to_nearest(gguf):
    errors, expected = {}, reference(TOKEN_NUMBERS)
    feed = windows(1)[0] | {"input_ids": np.array([TOKEN_NUMBERS])}
    for method in ("rtn", "gptq"):
        model = build(gguf)
        step = WeightOnly(method=method, min_weights=0, accuracy_level=0)
        pipeline = Pipeline(passes=[step], capabilities=OrtCpu().capabilities(), runner=reference_runner)
        (report,) = pipeline.run(model, windows(24))
        assert {"embed", "lm_head"} <= {e.node for e in report.edits if e.action == "applied"}
        assert max(v.const_value.size for v in model.graph.initializers.values()) == VOCABULARY * WIDTH // 2
        logits = reference_runner(model, ["logits"])(feed)["logits"][0]
        errors[method] = np.linalg.norm(logits - expected)
    assert errors["gptq"] < errors["rtn"]


def test_greedy_stops_at_the_end(model_path):
    decoder = Decoder(model_path)
    answer = list(decoder.greedy(TOKEN_NUMBERS, end=-1, most=5))
    assert answer[0] == reference(TOKEN_NUMBERS)[-1].argmax()
    assert len(answer) == 5
    assert list(decoder.greedy(TOKEN_NUMBERS, end=answer[2], most=5)) == answer[: answer.index(answer[2])]


def test_gguf_types(tmp_path):
    """Each type by its definition, value by value."""
    random = np.random.default_rng(1)
    nibbles, bytes_ = (
        random.integers(0, 256, (3, 16)).astype(np.uint8),
        random.integers(-128, 128, (3, 32)).astype("i1"),
    )
    d, m = (random.normal(size=(3, 1)).astype("<f2") for _ in range(2))
    floats = random.normal(size=(2, 5)).astype("<f2")

    def join(*columns: np.ndarray) -> bytes:
        return np.hstack([c.view(np.uint8) for c in columns]).tobytes()

    tensors = {
        "q4_0": (2, (3, 32), join(d, nibbles)),
        "q4_1": (3, (3, 32), join(d, m, nibbles)),
        "q8_0": (8, (3, 32), join(d, bytes_)),
        "f16": (1, (2, 5), floats.tobytes()),
        "other": (12, (3, 32), b"\0" * 432),
    }
    write(tmp_path / "types.gguf", {"general.architecture": "x"}, tensors)
    file = GgufFile(tmp_path / "types.gguf")
    codes = np.array([[(row[i % 16] >> (4 * (i // 16))) & 15 for i in range(32)] for row in nibbles], np.float32)
    np.testing.assert_allclose(file.tensor("q4_0"), (codes - 8) * d.astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(file.tensor("q4_1"), codes * d.astype(np.float32) + m.astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(file.tensor("q8_0"), bytes_ * d.astype(np.float32), rtol=1e-6)
    np.testing.assert_array_equal(file.tensor("f16"), floats)
    with pytest.raises(ValueError, match="type 12"):
        file.tensor("other")


def test_no_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"something else, and longer than a header")
    with pytest.raises(ValueError, match="no GGUF file"):
        GgufFile(tmp_path / "model.gguf")


def test_tokenizer(gguf):
    tokenizer = Tokenizer(gguf)
    names = [TOKENS[i] for i in tokenizer.encode("hello wall<end> he's 42\n")]
    assert names == ["hello", "Ġw", "a", "ll", "<end>", "Ġ", "he", "'", "s", "Ġ", "4", "2", "Ċ"]


@pytest.mark.parametrize("sentence", ["hello", "naïve 日本語 😀", "  two  spaces\n\n\tand _lines_ ", "x²½ 3.14", ""])
def test_a_text_comes_back(sentence, gguf):
    tokenizer = Tokenizer(gguf)
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """It knows a fact, and its perplexity is one of a model of its size (20.2 over 20,479 tokens; less text here)."""
    file = GgufFile(smollm2_weights())
    save(build(file), tmp_path / "smollm2.onnx")
    tokenizer, decoder = Tokenizer(file), Decoder(tmp_path / "smollm2.onnx", threads=2)
    prompt = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert "Paris" in tokenizer.decode(decoder.greedy(prompt, tokenizer.end, 20))
    if wikitext().is_file():
        tokens = tokenizer.encode(wikitext().read_text(encoding="utf-8")[:8000])[:1025]
        likelihoods = np.concatenate(list(decoder.log_likelihoods(tokens, 512, 512)))
        assert 15 < np.exp(-likelihoods.mean()) < 30
