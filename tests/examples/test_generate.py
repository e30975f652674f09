"""Generation with a bound cache: the same logits as in one run, whichever session reads or writes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from examples.llm.generate import BoundModel, Dense, sampler, write
from examples.llm.model import build
from examples.llm.session import Decoder
from onnxcomp import native
from onnxcomp.model import load, save
from onnxcomp.ops import DOMAIN
from onnxcomp.passes.threshold import Threshold
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import OrtCpu, reference_runner

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 2, 64, 4, 2, 96, 280
PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 21).tolist()
REST = np.random.default_rng(8).integers(0, VOCABULARY, 9).tolist()


class Weights:
    """Stands for a GGUF file of a small Llama."""

    metadata: ClassVar[dict[str, Any]] = {
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def tensor(self, name: str) -> np.ndarray:
        if "norm" in name:
            return self._random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        kv = WIDTH // HEADS * KV_HEADS
        rows = {"token_embd": VOCABULARY, "attn_k": kv, "attn_v": kv, "ffn_gate": HIDDEN, "ffn_up": HIDDEN}
        kind = name.removesuffix(".weight").split(".")[-1]
        shape = (rows.get(kind, WIDTH), HIDDEN if kind == "ffn_down" else WIDTH)
        return (2 * self._random.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "small.onnx"
    stand_in: Any = Weights()
    save(build(stand_in), path)
    return path


@pytest.fixture(scope="module")
def expected(model_path) -> np.ndarray:
    """Logits behind the prompt and behind each further token, by one run without a cache."""
    return Decoder(model_path).run(PROMPT + REST)[len(PROMPT) - 1 :]


def logits(writer: Dense) -> np.ndarray:
    return np.stack([writer.start(PROMPT), *(writer.step(token) for token in REST)])


def close(found: np.ndarray, want: np.ndarray, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_cache_goes_from_run_to_run(model_path, expected):
    writer = Dense(BoundModel(model_path))
    close(logits(writer), expected)
    close(logits(writer), expected)  # nothing is left of the first time


def test_another_session_writes(model_path, expected, tmp_path):
    """The prompt is read in float, the answer written with weights of 8 bits."""
    model = load(model_path)
    Pipeline(passes=[WeightOnly(bits=8, min_weights=0)], capabilities=OrtCpu().capabilities()).run(model)
    save(model, tmp_path / "decode.onnx")
    found = logits(Dense(BoundModel(model_path), BoundModel(tmp_path / "decode.onnx")))
    close(found[:1], expected[:1])
    assert 0 < np.linalg.norm(found[1:] - expected[1:]) < 0.1 * np.linalg.norm(expected[1:])


def test_values_of_earlier_runs_stay(model_path):
    """A run writes into no value that it was given or that an earlier one put out, so a text can go on in two ways."""
    model = BoundModel(model_path)
    first, cache = model.read(PROMPT, model.empty_cache())
    kept = {name: value.numpy().copy() for name, value in cache.items()}
    shown = first["logits"].numpy().copy()
    ways = [model.read([token], cache)[0]["logits"].numpy().copy() for token in (3, 5, 3)]
    for name, value in cache.items():
        np.testing.assert_array_equal(value.numpy(), kept[name])
    np.testing.assert_array_equal(first["logits"].numpy(), shown)
    np.testing.assert_array_equal(ways[0], ways[2])
    assert (ways[0] != ways[1]).any()


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_native_ops(model_path, expected, tmp_path):
    """Thresholds that drop nothing, by kernels of the library."""
    model = load(model_path)
    empty = np.zeros((1, KV_HEADS, 0, WIDTH // HEADS), np.float32)
    cache = {f"past_{kind}.{i}": empty for i in range(LAYERS) for kind in ("key", "value")}
    data = [{"input_ids": np.array([PROMPT]), **cache}]
    step = Threshold(method="cett", value=0.0)
    Pipeline(passes=[step], capabilities=OrtCpu().capabilities(), runner=reference_runner).run(model, data)
    calls = [node for node in model.graph if node.domain == DOMAIN]
    assert len(calls) == LAYERS
    for node in calls:
        node.domain = native.DOMAIN
    model.opset_imports[native.DOMAIN] = 1
    model.functions.clear()
    save(model, tmp_path / "native.onnx")
    close(logits(Dense(BoundModel(model_path), BoundModel(tmp_path / "native.onnx"))), expected)


def test_greedy(model_path):
    """Token by token the likeliest, and none behind the end."""
    decoder = Decoder(model_path)
    want = list(decoder.greedy(PROMPT, -1, 12))
    writer = Dense(BoundModel(model_path))
    answer = write(writer, PROMPT, -1, 12, sampler(0.0))
    assert answer.tokens == want
    assert len(answer.steps) == 11
    assert all(second > 0 for second in (answer.prefill, *answer.steps))
    assert any(a != b for a, b in pairwise(want))
    end = want[5]
    assert write(writer, PROMPT, end, 12, sampler(0.0)).tokens == want[: want.index(end)]


def test_temperature():
    """Tokens come as often as the probabilities say, within four standard deviations; a seed repeats them."""
    scores = np.array([0.0, 1.0, 2.0, -50.0], np.float32)
    for temperature in (0.5, 2.0):
        likely = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
        pick, again = sampler(temperature, 3), sampler(temperature, 3)
        drawn = [pick(scores) for _ in range(2000)]
        assert drawn == [again(scores) for _ in range(2000)]
        shares = np.bincount(drawn, minlength=4) / 2000
        assert (np.abs(shares - likely) <= 4 * np.sqrt(likely * (1 - likely) / 2000) + 1e-12).all()
