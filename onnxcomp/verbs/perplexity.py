"""The verb that measures the perplexity of a decoder on tokens, as executed on a target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.rewrite import Progress
from onnxcomp.specs import input_specs
from onnxcomp.target import Array, Feed
from onnxcomp.verbs.resolve import ModelLike, Shapes, compiled, load_model, make_target
from onnxcomp.verbs.tokens import TokenInput, TokenSource, load_tokens, log_likelihoods, token_input, windows


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured.

    Attributes:
        perplexity: Of the model.
        baseline: Of the other model; None without one.
        tokens: Number of tokens that were predicted.
        window: Tokens that a prediction is made from at most.
        stride: Tokens from one window to the next.
        target: Name of the target.
    """

    perplexity: float
    baseline: float | None
    tokens: int
    window: int
    stride: int
    target: str

    @property
    def rise(self) -> float | None:
        """Relative rise over the baseline; None without one."""
        return None if self.baseline is None else self.perplexity / self.baseline - 1.0


def perplexity(
    model: ModelLike,
    *,
    tokens: TokenSource,
    baseline: ModelLike | None = None,
    window: int = 512,
    stride: int | None = None,
    limit: int | None = None,
    target: str = "ort-cpu",
    threads: int = 1,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measures the perplexity of a decoder, with or without inputs for a cache, which stays empty.

    Args:
        model: Path or model.
        tokens: See `onnxcomp.verbs.tokens.load_tokens`.
        baseline: Another model to compare with, on the same tokens.
        window: Tokens that a prediction is made from at most; that of the model if it takes a fixed number.
        stride: Tokens from one window to the next; `window` if None. Smaller is slower, and leaves no token without
            others before it.
        limit: Most tokens to use.
        target: Where the model runs.
        threads: Threads a run.
        shapes: Fixes dynamic input shapes.
        progress: Told about every window.

    Raises:
        OnnxcompError: If anything is wrong with what was given, or the model takes no tokens.
    """
    numbers = load_tokens(tokens)[:limit]
    step = stride if stride is not None else window
    if not 1 <= step <= window:
        raise DataError(f"the stride has to be from 1 to the window of {window} tokens, or tokens are left out")
    found = [
        _measure(m, numbers, window, step, target, threads, shapes, progress)
        for m in (model, baseline)
        if m is not None
    ]
    return Perplexity(
        perplexity=found[0],
        baseline=found[1] if len(found) > 1 else None,
        tokens=len(numbers) - 1,
        window=window,
        stride=step,
        target=target,
    )


def _measure(
    model: ModelLike,
    numbers: Array,
    window: int,
    stride: int,
    target: str,
    threads: int,
    shapes: Shapes | None,
    progress: Progress | None,
) -> float:
    chosen = make_target(target)
    loaded = load_model(model, shapes)
    takes = token_input(loaded, input_specs(loaded))
    if takes is None:
        raise DataError("the model has no input that looks up tokens in a table, so it has no perplexity")
    with tempfile.TemporaryDirectory(prefix="onnxcomp-perplexity-") as folder:
        session = chosen.load(compiled(loaded, chosen, Path(folder, "artifact")), threads=threads)

        def run(feed: Feed) -> dict[str, Array]:
            session.reset()
            return session.run(feed)

        return text_perplexity(run, takes, numbers, window, stride, progress)


def text_perplexity(
    run: Callable[[Feed], dict[str, Array]],
    takes: TokenInput,
    numbers: Array,
    window: int,
    stride: int,
    progress: Progress | None = None,
) -> float:
    """Perplexity of all tokens but the first."""
    if numbers.max() >= takes.vocabulary:
        raise DataError(f"the model knows {takes.vocabulary} tokens and not {numbers.max()}: another tokenizer's?")
    fixed = takes.length()
    if fixed is not None and fixed != window:
        raise DataError(f"the model takes {fixed} tokens at a time; give --window {fixed}")
    total = -(-(len(numbers) - 1) // stride)
    likely = 0.0
    for index, part in enumerate(windows(numbers, window, stride)):
        if progress:
            progress("perplexity", index, total)
        count = len(part.tokens)
        # A causal model does not see what is filled up behind.
        tokens = part.tokens if fixed is None else np.pad(part.tokens, (0, fixed - count))
        logits = takes.logits(run(takes.feed(tokens)), len(tokens))[:count]
        likely += float(log_likelihoods(logits, part.targets).sum())
    with np.errstate(over="ignore"):  # a ruined model
        return float(np.exp(-likely / (len(numbers) - 1)))
