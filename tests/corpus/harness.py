"""Runs a model before and after a rewrite and says how the outputs differ; feeds are made from the input specs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxcomp.metrics import sqnr

NUMPY_TYPES = {"float": "float32", "double": "float64", "string": "object"}

ZOO = Path(os.environ.get("ONNXCOMP_ZOO", Path(__file__).parents[3] / "shared" / "zoo"))
"""Folder of real models, which are not part of the repository."""


def session(model: Path | bytes, *, optimize: bool = False) -> Any:
    """An onnxruntime session of one thread; without optimisation nothing hides what the file says."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def random_feed(inputs: Sequence[Any], size: int, seed: int) -> dict[str, np.ndarray]:
    """Random values for the inputs of a session; open dimensions get `size`, the first of an input 1."""
    random = np.random.default_rng(seed)
    feed: dict[str, np.ndarray] = {}
    for spec in inputs:
        shape = [d if isinstance(d, int) and d >= 0 else (1 if i == 0 else size) for i, d in enumerate(spec.shape)]
        kind = spec.type.removeprefix("tensor(").removesuffix(")")
        dtype = np.dtype(NUMPY_TYPES.get(kind, kind))
        if dtype.kind == "f":
            feed[spec.name] = random.standard_normal(shape).astype(dtype)
        elif dtype.kind == "O":
            feed[spec.name] = np.full(shape, "text", object)
        else:  # small, so that an index or a mask is valid
            feed[spec.name] = random.integers(0, 2, shape).astype(dtype)
    return feed


def valid_feeds(model: Path, count: int) -> list[dict[str, np.ndarray]]:
    """Random feeds of the smallest size that the model takes."""
    runner = session(model)
    for size in (1, 16, 48, 96, 224):
        feeds = [random_feed(runner.get_inputs(), size, seed) for seed in range(count)]
        try:
            outputs = runner.run(None, feeds[0])
        except Exception:  # onnxruntime's exceptions have no common root
            continue
        if all(len(np.shape(o)) == 0 or np.size(o) for o in outputs if isinstance(o, np.ndarray)):
            return feeds
    raise ValueError(f"no random feed fits {model.name}")


def differences(expected: Sequence[Any], found: Sequence[Any], rtol: float) -> Iterator[str]:
    """Says of each output how it differs: by more than `rtol` of the largest magnitude, or in anything but values."""
    if len(expected) != len(found):
        yield f"{len(expected)} outputs became {len(found)}"
    for index, (one, two) in enumerate(zip(expected, found, strict=False)):
        if (text := _difference(one, two, rtol)) is not None:
            yield f"output {index}: {text}"


def _difference(one: Any, two: Any, rtol: float) -> str | None:
    if type(one) is not type(two):
        return f"{type(one).__name__} became {type(two).__name__}"
    if isinstance(one, list):
        return next(differences(one, two, rtol), None)
    if isinstance(one, dict):
        keys = list(one)
        return "other keys" if keys != list(two) else next(differences([*one.values()], [*two.values()], rtol), None)
    if not isinstance(one, np.ndarray):
        return None if one == two or np.isclose(one, two, rtol) else f"{one} became {two}"
    if one.shape != two.shape or one.dtype != two.dtype:
        return f"{one.dtype}{one.shape} became {two.dtype}{two.shape}"
    if one.dtype.kind not in "fc":
        return None if np.array_equal(one, two) else f"{(one != two).sum()} of {one.size} elements differ"
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], two[~finite], equal_nan=True):
        return "NaN or infinity at other places"
    if not finite.any():
        return None
    scale = float(np.abs(one[finite]).max()) or 1.0
    error = float(np.abs(one[finite].astype(np.float64) - two[finite]).max()) / scale
    # Where 16 bits are computed in a constant, they are rounded once more or once less.
    rtol = max(rtol, 4 * float(np.finfo(one.dtype).eps)) if one.dtype.itemsize < 4 else rtol
    return None if error <= rtol else f"differs by {error:.1e} of its scale"


def worst_sqnr(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Lowest SQNR in dB of all outputs that are float tensors; NaN if there is none."""
    pairs = zip(expected, found, strict=True)
    values = [sqnr(a, b) for a, b in pairs if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.size]
    return min(values, default=float("nan"))


def run_all(model: Path, feeds: Sequence[Mapping[str, np.ndarray]], *, optimize: bool = False) -> list[list[Any]]:
    """Outputs of every feed."""
    runner = session(model, optimize=optimize)
    return [runner.run(None, dict(feed)) for feed in feeds]
