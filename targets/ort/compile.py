"""Compiles a model into an artifact folder, and opens such folders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.artifacts import new_artifact
from onnxcomp.errors import CompileError, DeviceError, GraphError
from onnxcomp.manifest import read_manifest, tensor_entry, versions, write_manifest
from onnxcomp.model import EXTERNAL_THRESHOLD, infer_shapes, load, name_nodes, save
from onnxcomp.state import model_state
from onnxcomp.target import Artifact, Audit, Capabilities
from onnxcomp.targets.ort.audit import audit
from onnxcomp.targets.ort.delta_lowering import DENSE as LOWERED_DENSE
from onnxcomp.targets.ort.dense_steps import DenseSteps
from onnxcomp.targets.ort.manifest import (
    DATA,
    DENSE,
    FILES,
    MANY,
    MANY_DATA,
    MODEL,
    PACKAGES,
    Manifest,
    check_files,
)  # fmt: skip
from onnxcomp.targets.ort.providers import CPU_ONLY, TENSORRT, Provider
from onnxcomp.targets.ort.rows import few_rows, find_rows, to_many_rows
from onnxcomp.targets.ort.runtime import make_session, missing_provider, session_options
from onnxcomp.targets.ort.session import OrtSession

_log = logging.getLogger(__name__)


def compile_model(
    model: ir.Model,
    out: Path,
    capabilities: Capabilities,
    providers: Callable[[ir.Model], Sequence[Provider]] = lambda _: CPU_ONLY,
) -> Artifact:
    """Compiles `model`, which stays as it is, into the folder `out`.

    The folder is built beside `out` and moved into place when it is complete. An artifact that is there is replaced by
    a rename; anything else that is there is left alone.

    Args:
        model: The model.
        out: The folder.
        capabilities: Of the target.
        providers: What the model, without function calls, is to run with. Where onnxruntime cannot use one of them, the
            model is checked on the CPU, and the audit says that it looked at nothing.

    Raises:
        CompileError: If onnxruntime rejects the model, or `out` cannot be written or holds something else.
        UnsupportedError: If an op has no kernel.
    """
    out = out.resolve()
    opset = model.opset_imports.get("", 0)
    if opset > capabilities.max_opset:
        raise CompileError(
            f"the model has opset {opset}, the installed onnxruntime has kernels up to {capabilities.max_opset}; "
            "convert the model to that opset, or install a newer onnxruntime"
        )
    working = _prepare(model)
    with new_artifact(out, FILES) as (folder, scratch):
        manifest = _build(working, folder, scratch, capabilities, providers, model.meta.get(LOWERED_DENSE))
    return _artifact(out, manifest)


def open_artifact(path: Path, target: str) -> Artifact:
    """Reads the artifact in folder `path`, and checks it in full.

    Raises:
        TargetError: If it is not an artifact of `target`, or was damaged.
    """
    manifest = read_manifest(Manifest, path, target)
    check_files(path, manifest)
    compiled, installed = _runtime(manifest.versions), _runtime(versions(PACKAGES))
    if compiled != installed and not manifest.unaudited:
        _log.warning(
            "%s was compiled and audited with onnxruntime %s, but %s is installed; compile it again to know what runs",
            path, compiled, installed,
        )  # fmt: skip
    return _artifact(path, manifest)


def _runtime(found: Mapping[str, str]) -> str | None:
    """Version of onnxruntime, whichever build of it."""
    return found.get("onnxruntime-gpu", found.get("onnxruntime"))


def _artifact(path: Path, manifest: Manifest) -> Artifact:
    return Artifact(path=path, manifest=manifest.model_dump(), audit=manifest.to_audit())


def _prepare(model: ir.Model) -> ir.Model:
    """A copy without function calls and with unique node names, so that every node can be told apart afterwards."""
    working = model.clone()
    if working.functions:
        try:
            common_passes.InlinePass()(working)
        except Exception as error:  # onnx_ir wraps whatever goes wrong in a pass
            cause = error.__cause__ or error
            raise CompileError(
                f"the model's functions {[f[1] for f in working.functions]} cannot be inlined: {cause}"
            ) from error
    name_nodes(working)
    return working


def _build(
    model: ir.Model,
    folder: Path,
    scratch: Path,
    capabilities: Capabilities,
    providers: Callable[[ir.Model], Sequence[Provider]],
    dense: tuple[ir.Model, DenseSteps] | None,
) -> Manifest:
    try:
        save(model, folder / MODEL)  # the weights, wherever they lie now, go along
        chosen = providers(model)
        optimized, session = _optimized(model, folder / MODEL, scratch, chosen)
        on_cpu = tuple(chosen) == CPU_ONLY
        rows = find_rows(model) if on_cpu and not session.states else None
        if rows is not None:
            rows = rows.model_copy(update={"few": few_rows(model, capabilities.break_even)})
            rows = rows if _save_both(model, folder, capabilities, rows.few) else None
        if dense is not None:
            save(_prepare(dense[0]), folder / DENSE)
    except (GraphError, ValueError) as error:
        raise CompileError(str(error)) from error
    if isinstance(optimized, str):
        found = Audit(rows=(), note=optimized)
    else:
        infer_shapes(model)  # after saving: the audit needs shapes, the runtime infers its own
        found = audit(model, optimized)
    return write_manifest(
        Manifest,
        folder,
        found,
        files=FILES,
        packages=PACKAGES,
        target=capabilities.target,
        features=list(capabilities.features),
        opsets=dict(model.opset_imports),
        inputs=[tensor_entry(s) for s in session.inputs],
        outputs=[tensor_entry(s) for s in session.outputs],
        state=[s.model_dump() for s in session.states],
        rows=rows.model_dump() if rows is not None else None,
        dense=dense[1].model_dump() if dense is not None else None,
        providers=[p.model_dump() for p in chosen],
    )


def _optimized(
    model: ir.Model, path: Path, scratch: Path, providers: Sequence[Provider]
) -> tuple[onnx.ModelProto | str, OrtSession]:
    """Loads the model as it will be run and reads the optimised graph back, without weights, or says why it cannot."""
    try:
        state = model_state(model)
    except GraphError as error:
        raise CompileError(str(error)) from error
    optimized = scratch / "optimized.onnx"
    unread = TENSORRT in {p.name for p in providers}
    options = session_options(threads=1, domains=model.opset_imports)
    if not unread:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    reason = f"not audited: this onnxruntime has no {missing}" if (missing := missing_provider(providers)) else ""
    if not reason:
        try:
            session = OrtSession(make_session(path, options, providers), state)
            if unread:
                return "not audited: TensorRT makes engines of whole subgraphs, which cannot be read back", session
            return onnx.load(optimized, load_external_data=False), session
        except DeviceError as error:
            reason = f"not audited: {error}"
    plain = session_options(threads=1, domains=model.opset_imports, optimize=False)
    return reason, OrtSession(make_session(path, plain), state)


def _save_both(model: ir.Model, folder: Path, capabilities: Capabilities, few: int) -> bool:
    """Saves the model with one for more than `few` rows beside it, which shares weights with it, if that differs."""
    if not to_many_rows(model.clone(), capabilities.break_even, few):
        return False
    for name in (MODEL, DATA):
        (folder / name).unlink(missing_ok=True)
    save(model, folder / MODEL, external=True)
    many = load(folder / MODEL)  # whose weights lie in the file now, so that both read them there
    to_many_rows(many, capabilities.break_even, few)
    own = [v for v in many.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
    tensors = [t for v in own if (t := v.const_value) is not None]
    if sum(t.nbytes for t in tensors) > EXTERNAL_THRESHOLD:
        stored = ir.external_data.convert_tensors_to_external(tensors, folder, MANY_DATA)
        for value, tensor in zip(own, stored, strict=True):
            value.const_value = tensor
    ir.save(many, folder / MANY)
    return True
