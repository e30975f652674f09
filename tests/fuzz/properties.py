"""What holds for every model: nothing but an `OnnxcompError` comes out, and cleanup keeps the function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcomp.api import compile, inspect, legalize, rewrite
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import load, save
from onnxcomp.passes._nm_scores import Method
from onnxcomp.passes.delta import Delta
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.passes.permute import Permute
from onnxcomp.specs import input_specs
from onnxcomp.targets.ort import OrtCpu, reference_runner
from onnxcomp.targets.ort.runtime import make_session, session_options
from onnxcomp.unrounded import unrounded
from onnxcomp.verbs.resolve import lowered
from tests.corpus.harness import differences, run_all, session

RTOL = 1e-3
"""Of the largest magnitude of an output; a fold adds roundings, and random graphs may lose digits by cancellation."""
ATOL = 2e-6
"""What a fused kernel may be off: it has sigmoid(-16) to eight digits behind the point, of which none counts."""


def check_model(
    model: onnx.ModelProto,
    feeds: Sequence[dict[str, np.ndarray]],
    folder: Path,
    external: bool,
    stage: Callable[[str], object] = str,
) -> str:
    """Cleans up and quantizes a valid model, and legalizes that; makes it N:M sparse and packs it.

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
    options = {"save_as_external_data": True, "location": "model.bin", "size_threshold": 16} if external else {}
    (folder / "model.bin").unlink(missing_ok=True)
    onnx.save(model, path, **options)  # type: ignore[arg-type]
    stage("original")
    try:
        before = run_all(path, feeds)
        optimized = run_all(path, feeds, optimize=True)
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
        _check_same(path, result, before, optimized, feeds)
    data = [{k: f[k] for k in feeds[0]} for f in feeds]
    try:
        rewrite(path, result, recipe="int8", data=data)
        run_all(result, feeds)
        run_all(result, feeds, optimize=True)
        assert _interface(session(path)) == _interface(session(result)), "int8 changed the interface"
        compile(result, folder / "artifact")
        legalize(result, None, data=data, reference=path)
        _check_unrounded(result, folder / "unrounded.onnx", feeds)
    except OnnxcompError as error:
        _check_reason(error)
        refused = True
    try:
        _check_sparse(path, folder, before, optimized, feeds, data)
    except OnnxcompError as error:
        _check_reason(error)
        refused = True
    try:
        _check_stream(path, folder, before, feeds, data)
    except OnnxcompError as error:
        _check_reason(error)
        refused = True
    return "refused" if refused else "same"


def _check_stream(
    path: Path,
    folder: Path,
    before: list[list[Any]],
    feeds: Sequence[dict[str, np.ndarray]],
    data: Sequence[dict[str, np.ndarray]],
) -> None:
    """A stream that sends every change puts out what the model does, in the portable form and by kernels."""
    found = rewrite(path, folder / "step.onnx", recipe=[Delta(threshold=0.0)], data=data[:1])
    shapes = {s.name: s.shape for s in input_specs(found.model)}
    fitting = [i for i, f in enumerate(feeds) if all(k in shapes and _fits(v.shape, shapes[k]) for k, v in f.items())]
    order = [i for i in (*fitting, *reversed(fitting)) for _ in range(2)]  # every feed twice: then nothing changes
    names = [v.name for v in load(path).graph.outputs]
    target = OrtCpu()
    session = target.load(target.compile(lowered(found.model, target)[0], folder / "artifact"))
    runs = {"portable": reference_runner(found.model, [n or "" for n in names]), "kernels": session.run}
    for kind, run in runs.items():
        streamed = [[outputs[n] for n in names] for outputs in (run(feeds[i]) for i in order)]
        off = _changes([before[i] for i in order], streamed, ATOL)
        assert not off, f"as a stream ({kind}) the outputs are others: {off}"


def _fits(given: tuple[int, ...], stated: Sequence[int | str | None] | None) -> bool:
    return stated is None or (
        len(given) == len(stated) and all(g == s for g, s in zip(given, stated, strict=True) if isinstance(s, int))
    )


def _check_sparse(
    path: Path,
    folder: Path,
    before: list[list[Any]],
    optimized: list[list[Any]],
    feeds: Sequence[dict[str, np.ndarray]],
    data: Sequence[dict[str, np.ndarray]],
) -> None:
    """Another order of channels changes nothing, nor does packing what a mask made sparse."""
    permuted, masked, packed = (folder / f"{name}.onnx" for name in ("permuted", "masked", "packed"))
    rewrite(path, permuted, recipe=[Permute(score="magnitude", include_ends=True)])
    _check_same(path, permuted, before, optimized, feeds, "permute")
    method: Method
    for method in ("sparsegpt", "wanda"):
        rewrite(permuted, masked, recipe=[NmMask(method=method, include_ends=True)], data=data)
        sparse = run_all(masked, feeds)
        assert _interface(session(path)) == _interface(session(masked)), "nm_mask changed the interface"
    rewrite(masked, packed, recipe=[NmPack()])
    _check_same(masked, packed, sparse, run_all(masked, feeds, optimize=True), feeds, "nm_pack")
    for target in ("ort-cpu", "ort-tensorrt"):
        artifact = compile(packed, folder / "artifact", target=target)
        options = session_options(threads=1, domains=artifact.manifest["opsets"], optimize=False)
        runner = make_session(artifact.path / "model.onnx", options)
        found = _changes(sparse, [runner.run(None, dict(feed)) for feed in feeds], ATOL)
        assert not found, f"compiled for {target}, the packed model's outputs are others: {found}"


def _check_same(
    path: Path,
    result: Path,
    before: list[list[Any]],
    optimized: list[list[Any]],
    feeds: Sequence[dict[str, np.ndarray]],
    what: str = "cleanup",
) -> None:
    """The result is the original where nothing is optimised; optimised it is either original, as fusions round anew."""
    found = _changes(before, run_all(result, feeds))
    assert not found, f"{what} changed the outputs: {found}"
    after = run_all(result, feeds, optimize=True)
    found = min((_changes(original, after, ATOL) for original in (optimized, before)), key=len)
    assert not found, f"optimised, the outputs after {what} are others: {found}"
    assert _interface(session(path)) == _interface(session(result)), f"{what} changed the interface"


def _changes(before: list[list[Any]], after: list[list[Any]], atol: float = 0.0) -> list[str]:
    """How the outputs of each feed differ; elements that are apart by no more than `atol` are the same."""
    found: list[str] = []
    for one, two in zip(before, after, strict=True):
        near = [_nearer(a, b, atol) for a, b in zip(one, two, strict=True)] if len(one) == len(two) else two
        found += differences(one, near, RTOL)
    return found


def _nearer(one: Any, two: Any, atol: float) -> Any:
    if not all(isinstance(v, np.ndarray) for v in (one, two)) or (one.dtype, one.shape) != (two.dtype, two.shape):
        return two
    if one.dtype.kind != "f" or not atol:
        return two
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return np.where(np.abs(one - two) <= atol, one, two)


def _check_unrounded(path: Path, out: Path, feeds: Sequence[dict[str, np.ndarray]]) -> None:
    found = unrounded(load(path))
    if found is None:
        return
    save(found, out)
    kinds = [[[(o.shape, o.dtype) for o in outputs] for outputs in run_all(p, feeds)] for p in (path, out)]
    assert kinds[0] == kinds[1], "without rounding, outputs are of another kind"
    assert _interface(session(path)) == _interface(session(out)), "without rounding, the interface is another"


def _check_reason(error: OnnxcompError) -> None:
    text = str(error)
    assert "is not valid" not in text, f"a pass made a bad graph: {text}"
    assert "rejects the model" not in text, f"a valid model cannot be run: {text}"
    assert "cannot be run" not in text, f"what was made of a valid model cannot be run: {text}"
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
