"""Runs the decoder: its cache from run to run, greedy continuation, perplexity of a text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onnxcomp.targets.ort.runtime import make_session, session_options

_ROOT = Path(__file__).resolve().parents[2]


def wikitext() -> Path:
    """Text of WikiText-2: `ONNXCOMP_WIKITEXT`, or where the project keeps it during development."""
    default = _ROOT.parent / "shared" / "data" / "wikitext2_valid.txt"
    return Path(os.environ.get("ONNXCOMP_WIKITEXT") or default)


class Decoder:
    """An ONNX decoder in onnxruntime with its cache, which `cache` holds by input name.

    Args:
        path: The model.
        threads: Threads of one run.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        # Whatever ops of other domains the model uses are onnxruntime's own.
        self._session = make_session(Path(path), session_options(threads=threads))
        self._empty = {i.name: _empty(i.shape) for i in self._session.get_inputs() if i.name != "input_ids"}
        self._outputs = ["logits", *(name.replace("past_", "present_") for name in self._empty)]
        self.reset()

    def reset(self) -> None:
        """Forgets what was run before."""
        self.cache = dict(self._empty)

    def run(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [T, vocabulary] behind each of `tokens`, which follow on those run before."""
        ids = np.asarray(tokens, np.int64)[None]
        logits, *present = self._session.run(self._outputs, {"input_ids": ids, **self.cache})
        self.cache = dict(zip(self.cache, present, strict=True))
        return np.asarray(logits[0])

    def greedy(self, prompt: Sequence[int], end: int, most: int = 100) -> Iterator[int]:
        """Likeliest continuation of a prompt, token by token, up to the token `end`."""
        self.reset()
        tokens: Sequence[int] = prompt
        for _ in range(most):
            token = int(self.run(tokens)[-1].argmax())
            if token == end:
                return
            yield token
            tokens = [token]

    def log_likelihoods(self, tokens: Sequence[int], window: int, stride: int) -> Iterator[np.ndarray]:
        """Log-likelihoods of all tokens but the first, each predicted from at most `window` tokens before it.

        Windows start every `stride` tokens; of one that overlaps the last, only the new tokens are scored.
        """
        scored = 1
        for start in range(0, len(tokens) - 1, stride):
            part = tokens[start : start + window + 1]
            self.reset()
            logits = self.run(part[:-1])[scored - start - 1 :].astype(np.float64)
            top = logits.max(axis=-1, keepdims=True)
            norm = top[:, 0] + np.log(np.exp(logits - top).sum(axis=-1))
            yield logits[np.arange(len(logits)), part[scored - start :]] - norm
            scored = start + len(part)
            if scored == len(tokens):
                return


def _empty(shape: Sequence[int | str]) -> np.ndarray:
    """A cache of no tokens: the open dimension of its shape is their number."""
    return np.zeros([d if isinstance(d, int) else 0 for d in shape], np.float32)
