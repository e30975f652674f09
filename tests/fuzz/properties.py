"""What holds for every model: nothing but an `OnnxcompError` comes out, and cleanup keeps the function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcomp.api import compile, inspect, rewrite
from onnxcomp.errors import OnnxcompError
from tests.corpus.harness import differences, run_all, session

RTOL = 1e-3
"""Of the largest magnitude of an output; a fold adds roundings, and random graphs may lose digits by cancellation."""


def check_model(
    model: onnx.ModelProto,
    feeds: Sequence[dict[str, np.ndarray]],
    folder: Path,
    external: bool,
    stage: Callable[[str], object] = str,
) -> str:
    """Cleans up and quantizes a valid model.

    Args:
        model: The model.
        feeds: What it is run with; the first one has the inputs that have no default.
        folder: For its files.
        external: Whether weights lie beside the model.
        stage: Told `original` before onnxruntime is given the original, which may abort the process, and `ours` after.

    Returns:
        `invalid` if onnxruntime does not run it, else what became of it: `same`, or `refused`.

    Raises:
        AssertionError: If its outputs or its interface changed, or the result does not run.
    """
    path = folder / "model.onnx"
    data = {"save_as_external_data": True, "location": "model.bin", "size_threshold": 16} if external else {}
    (folder / "model.bin").unlink(missing_ok=True)
    onnx.save(model, path, **data)  # type: ignore[arg-type]
    stage("original")
    try:
        before = run_all(path, feeds)
        run_all(path, feeds, optimize=True)
    except Exception:  # onnxruntime's exceptions have no common root
        return "invalid"
    stage("ours")
    if not all(np.isfinite(o).all() for outputs in before for o in outputs):
        return "invalid"
    refused = False
    result = folder / "result.onnx"
    try:
        rewrite(path, result, recipe="cleanup")
    except OnnxcompError as error:
        _check_reason(error)
        refused = True
    else:
        _check_same(path, result, before, feeds)
    try:
        rewrite(path, result, recipe="int8", data=[{k: f[k] for k in feeds[0]} for f in feeds])
        run_all(result, feeds)
        run_all(result, feeds, optimize=True)
        assert _interface(session(path)) == _interface(session(result)), "int8 changed the interface"
        compile(result, folder / "artifact")
    except OnnxcompError as error:
        _check_reason(error)
        refused = True
    return "refused" if refused else "same"


def _check_same(path: Path, result: Path, before: list[list[Any]], feeds: Sequence[dict[str, np.ndarray]]) -> None:
    for optimize in (False, True):
        after = run_all(result, feeds, optimize=optimize)
        found = [text for a, b in zip(before, after, strict=True) for text in differences(a, b, RTOL)]
        assert not found, f"cleanup changed the outputs: {found}"
    assert _interface(session(path)) == _interface(session(result)), "cleanup changed the interface"


def _check_reason(error: OnnxcompError) -> None:
    text = str(error)
    assert "is not valid" not in text, f"a pass made a bad graph: {text}"
    assert "rejects the model" not in text, f"a valid model cannot be run: {text}"
    assert "cannot write" not in text, text


def _interface(runner: Any) -> list[list[tuple[str, str]]]:
    parts = (runner.get_inputs(), runner.get_overridable_initializers(), runner.get_outputs())
    return [[(v.name, v.type) for v in part] for part in parts]


def check_file(data: bytes, folder: Path) -> str:
    """Looks at and cleans up a file that may be damaged; nothing is run.

    Returns:
        `same` if it could be read and rewritten, else `refused`.
    """
    path = folder / "damaged.onnx"
    path.write_bytes(data)
    try:
        inspect(path)
        rewrite(path, folder / "result.onnx", recipe="cleanup")
    except OnnxcompError:
        return "refused"
    return "same"
