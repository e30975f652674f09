"""Tokens for decoders: read from files, cut into windows, and fed with whatever else a decoder wants beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.data import load_function
from onnxcomp.errors import DataError
from onnxcomp.structure import Structure
from onnxcomp.target import Array, Feed, TensorSpec

TokenSource: TypeAlias = "str | Path | Sequence[int] | Array"


def load_tokens(source: TokenSource) -> Array:
    """Numbers of tokens, int64 `(tokens,)`.

    Args:
        source: A `.npy` file, or `.npz` file of one array, of integers; a text file of numbers; `module:function`,
            which returns numbers; or the numbers.

    Raises:
        DataError: If it does not exist, holds no integers, or fewer than two.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the tokens"
    array = np.asarray(_read(source) if isinstance(source, (str, Path)) else source).reshape(-1)
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name}: token numbers have to be integers, not {array.dtype}")
    if array.size < 2 or array.min() < 0:
        raise DataError(f"{name}: there have to be at least two tokens, and none below 0")
    return array.astype(np.int64)


def _read(source: str | Path) -> Array:
    path = Path(source)
    if not path.exists():
        if ":" in str(source):
            return np.asarray(list(load_function(str(source))()))
        raise DataError(f"there are no tokens at {path}")
    try:
        if path.suffix in (".npy", ".npz"):
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            if len(loaded.files) != 1:
                raise DataError(f"{path}: there have to be the token numbers alone, not {sorted(loaded.files)}")
            return np.asarray(loaded[loaded.files[0]])
        return np.array([int(word) for word in path.read_text(encoding="utf-8").replace(",", " ").split()], np.int64)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as token numbers: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TokenInput:
    """How a decoder takes tokens.

    Attributes:
        name: The input for tokens.
        vocabulary: Number of tokens that it knows.
        inputs: All inputs of the model.
    """

    name: str
    vocabulary: int
    inputs: tuple[TensorSpec, ...]

    def feed(self, tokens: Array) -> Feed:
        """Feed of one window, with an empty cache.

        Raises:
            DataError: If the model has an input of which it is not known what it wants.
        """
        return {spec.name: self._value(spec, tokens) for spec in self.inputs}

    def length(self) -> int | None:
        """Number of tokens that the model takes at a time; None if it takes any."""
        shape = next(spec.shape for spec in self.inputs if spec.name == self.name)
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    def logits(self, outputs: Mapping[str, Array], count: int) -> Array:
        """Logits of each of `count` tokens, `(count, vocabulary)`, from the outputs of a run.

        Raises:
            DataError: If no output holds them.
        """
        for array in outputs.values():
            if array.ndim >= 2 and array.shape[-1] >= self.vocabulary and array.shape[-2] == count:
                return array.reshape(-1, array.shape[-1])[-count:]
        shapes = {name: array.shape for name, array in outputs.items() if array.ndim >= 2}
        raise DataError(f"no output scores {self.vocabulary} tokens at each of {count} places; there are {shapes}")

    def _value(self, spec: TensorSpec, tokens: Array) -> Array:
        if spec.name == self.name:
            return self._row(spec, tokens)
        if np.issubdtype(spec.dtype, np.integer) and "mask" in spec.name:
            return self._row(spec, np.ones_like(tokens))
        if np.issubdtype(spec.dtype, np.integer) and "position" in spec.name:
            return self._row(spec, np.arange(len(tokens)))
        if np.issubdtype(spec.dtype, np.integer) and "type" in spec.name:
            return self._row(spec, np.zeros_like(tokens))
        if spec.dtype == np.bool_:
            return np.zeros([d if isinstance(d, int) else 1 for d in spec.shape or ()], np.bool_)
        open_axes = [i for i, d in enumerate(spec.shape or ()) if not isinstance(d, int)]
        if np.issubdtype(spec.dtype, np.floating) and spec.shape is not None and max(open_axes, default=0) > 0:
            return np.zeros([d if isinstance(d, int) else int(i == 0) for i, d in enumerate(spec.shape)], spec.dtype)
        raise DataError(f"it is not known what the model wants for its input {spec.name!r} beside tokens")

    def _row(self, spec: TensorSpec, values: Array) -> Array:
        rank = 2 if spec.shape is None else len(spec.shape)
        return np.asarray(values.reshape((1,) * (rank - 1) + (-1,)), spec.dtype)


def token_input(model: ir.Model, inputs: Sequence[TensorSpec]) -> TokenInput | None:
    """The input of a decoder that takes tokens, or None if there is none."""
    if model.functions:
        model = model.clone()
        common_passes.InlinePass()(model)
    tables = Structure(model).token_tables()
    name = next(iter(tables), None)
    return None if name is None else TokenInput(name=name, vocabulary=tables[name], inputs=tuple(inputs))


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens to predict from, and those to predict.

    Attributes:
        tokens: What the model sees.
        targets: The tokens behind the last `len(targets)` of them.
    """

    tokens: Array
    targets: Array


def windows(tokens: Array, window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` tokens that start every `stride`; each token but the first is a target once."""
    scored = 1
    for start in range(0, len(tokens) - 1, stride):
        part = tokens[start : start + window + 1]
        yield Window(tokens=part[:-1], targets=part[scored - start :])
        scored = start + len(part)
        if scored == len(tokens):
            return


def log_likelihoods(logits: Array, targets: Array) -> Array:
    """Logarithms of the probabilities of `targets`, by the last rows of `logits`, float64."""
    rows = logits[-len(targets) :].astype(np.float64)
    top = rows.max(axis=-1, keepdims=True)
    norm = top[:, 0] + np.log(np.exp(rows - top).sum(axis=-1))
    return np.asarray(rows[np.arange(len(targets)), targets] - norm)
