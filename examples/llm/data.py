"""WikiText-2 for the decoder: one end of the text to calibrate, the other to evaluate.

onnxcomp compress smollm2.onnx -o out --recipe weight_only4_gptq --data examples.llm.data:calibration \
    --eval-data examples.llm.data:evaluation --metric examples.llm.data:perplexity
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from examples.llm.gguf import GgufFile
from examples.llm.model import Config, smollm2_weights
from examples.llm.session import wikitext
from examples.llm.tokenizer import Tokenizer

WINDOW, CALIBRATION, EVALUATION = 512, 32, 8

Feed = Mapping[str, np.ndarray]


def calibration() -> Iterator[Feed]:
    """Windows from the end of the text, each from an empty cache."""
    yield from _feeds(-CALIBRATION, None)


def evaluation() -> Iterator[Feed]:
    """Windows from the start of the text."""
    yield from _feeds(0, EVALUATION)


def perplexity(run: Callable[[Feed], Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Perplexity within the windows of `evaluation`."""
    scores = []
    for feed in evaluation():
        logits = run(feed)["logits"][0, :-1].astype(np.float64)
        likely = logits[np.arange(len(logits)), feed["input_ids"][0, 1:]]
        scores.append(likely - np.logaddexp.reduce(logits, axis=-1))
    return {"perplexity": float(np.exp(-np.concatenate(scores).mean()))}


def _feeds(first: int, last: int | None) -> Iterator[Feed]:
    file = GgufFile(smollm2_weights())
    config = Config.read(file)
    numbers = Tokenizer(file).encode(wikitext().read_text(encoding="utf-8"))
    windows = np.array(numbers[: len(numbers) // WINDOW * WINDOW], np.int64).reshape(-1, 1, WINDOW)
    empty = np.zeros((1, config.kv_heads, 0, config.head_size), np.float32)
    cache = {f"past_{kind}.{i}": empty for i in range(config.layers) for kind in ("key", "value")}
    for window in windows[first:last]:
        yield {"input_ids": window, **cache}
