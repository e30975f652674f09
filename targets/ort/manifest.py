"""The manifest of an artifact: written once, and checked in full when the artifact is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxcomp.errors import TargetError
from onnxcomp.model import file_hash
from onnxcomp.state import StateSpec
from onnxcomp.target import MANIFEST_VERSION, Artifact, Audit, AuditRow, Feed, TensorSpec
from onnxcomp.targets.ort.dense_steps import DenseSteps
from onnxcomp.targets.ort.providers import CPU_ONLY, Provider
from onnxcomp.targets.ort.rows import Rows

MANIFEST = "manifest.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
MANY = "many.onnx"
"""The model for feeds of many rows, where that is another one; it shares weights in `DATA`."""
MANY_DATA = "many.onnx.data"
DENSE = "dense.onnx"
"""The model for steps of a stream in which much changes."""
DENSE_DATA = "dense.onnx.data"
FILES = (MODEL, DATA, MANY, MANY_DATA, DENSE, DENSE_DATA)

_MAX_BYTES = 64 << 20


DType = Literal[
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "string",
    "uint8", "uint16", "uint32", "uint64",
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Strict):
    """One file of the artifact."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorEntry(_Strict):
    """One input or output; a dimension that is not fixed is a name or null."""

    name: str
    dtype: DType
    shape: list[int | str | None] | None


class RowEntry(_Strict):
    """One row of the audit."""

    node: str
    op_type: str
    executed_as: str
    macs: int = Field(ge=0)
    quantized: bool
    integer: bool
    reason: str
    executed_name: str = ""


class Manifest(_Strict):
    """Content of `manifest.json`.

    Attributes:
        manifest_version: Format of this file.
        target: Name of the target.
        versions: Package to version that compiled it; the audit holds for that onnxruntime.
        features: Instruction sets of the CPU that it was compiled on; the audit holds for such a CPU.
        files: File name to size and hash.
        opsets: Op domain to version.
        inputs: What a feed gives, state excluded.
        outputs: What a run returns, state excluded.
        state: Streaming state.
        executed_ops: Op type to number of nodes in the executable.
        audit: What each compute node became.
        rows: Tells feeds for `MANY` from those for `MODEL`, if there are both.
        dense: Tells steps for `DENSE` from those for `MODEL`, if there are both.
        providers: What onnxruntime runs it with, with the options of each.
        unaudited: Why the audit is empty; empty if the executable was read back.
    """

    manifest_version: Literal[1]
    target: str
    versions: dict[str, str]
    features: list[str]
    files: dict[str, FileEntry]
    opsets: dict[str, int]
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    state: list[StateSpec]
    executed_ops: dict[str, int]
    audit: list[RowEntry]
    rows: Rows | None = None
    dense: DenseSteps | None = None
    providers: list[Provider] = Field(default_factory=lambda: list(CPU_ONLY), min_length=1)
    unaudited: str = ""

    def to_audit(self) -> Audit:
        """The audit as the core knows it."""
        return Audit(
            rows=tuple(AuditRow(**row.model_dump()) for row in self.audit),
            executed_ops=dict(self.executed_ops),
            note=self.unaudited,
        )


def versions() -> dict[str, str]:
    """Versions of the packages that an audit depends on."""
    packages = ("onnxcomp", "onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir")
    return {package: found for package in packages if (found := _version(package))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def tensor_entry(spec: TensorSpec) -> dict[str, Any]:
    """A spec as JSON."""
    dtype = "string" if spec.dtype.kind == "O" else str(spec.dtype)
    return {"name": spec.name, "dtype": dtype, "shape": None if spec.shape is None else list(spec.shape)}


def input_specs(manifest: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Specs of the inputs that a feed has to give, by name."""
    found: dict[str, TensorSpec] = {}
    for entry in manifest["inputs"]:
        dtype = np.dtype(object) if entry["dtype"] == "string" else np.dtype(entry["dtype"])
        shape = None if entry["shape"] is None else tuple(entry["shape"])
        found[entry["name"]] = TensorSpec(name=entry["name"], dtype=dtype, shape=shape)
    return found


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of the model files in `folder`."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)}
        for name in FILES
        if (folder / name).is_file()
    }


def write_manifest(folder: Path, audit: Audit, **fields: Any) -> Manifest:
    """Writes `manifest.json` and returns what was written, validated."""
    manifest = Manifest.model_validate(
        {
            "manifest_version": MANIFEST_VERSION,
            "versions": versions(),
            "files": file_entries(folder),
            "executed_ops": dict(audit.executed_ops),
            "audit": [asdict(row) for row in audit.rows],
            "unaudited": audit.note,
            **fields,
        }
    )
    text = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path, target: str) -> Manifest:
    """Reads `manifest.json` of an artifact of `target`; the model files are not looked at.

    Raises:
        TargetError: If there is none, or it is not valid.
    """
    path = folder / MANIFEST
    try:
        if not path.is_file():
            raise TargetError(f"{folder} is not an artifact: it has no {MANIFEST}; make one with: onnxcomp compile")
        if path.stat().st_size > _MAX_BYTES:
            raise TargetError(f"{path} has more than {_MAX_BYTES >> 20} MiB; it was not written by onnxcomp")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{path} cannot be read as JSON ({error}); compile the model again") from error
    _check_head(path, data, target)
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise TargetError(f"{path} is not valid: {where}: {first['msg']}; compile the model again") from error


def _check_head(path: Path, data: object, target: str) -> None:
    if not isinstance(data, Mapping):
        raise TargetError(f"{path} is not valid: it has to be a JSON object; compile the model again")
    if data.get("manifest_version") != MANIFEST_VERSION:
        raise TargetError(
            f"{path} has manifest version {data.get('manifest_version')!r}, this onnxcomp reads {MANIFEST_VERSION}; "
            "compile the model again"
        )
    if data.get("target") != target:
        raise TargetError(f"{path} was compiled for target {data.get('target')!r}, not for {target!r}")


def providers_of(artifact: Artifact) -> tuple[Provider, ...]:
    """What an artifact is run with."""
    return tuple(Provider.model_validate(entry) for entry in artifact.manifest["providers"])


def model_hash(artifact: Artifact) -> str:
    """Hash over those of all model files: weights that lie beside the model may differ alone."""
    entries = sorted(f"{name} {entry['sha256']}" for name, entry in artifact.manifest["files"].items())
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def model_file(artifact: Artifact, feed: Feed) -> Path:
    """The model of an artifact that runs a feed."""
    rows = artifact.manifest["rows"]
    many = rows is not None and Rows.model_validate(rows).many(feed)
    return artifact.path / (MANY if many else MODEL)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the model files with the manifest.

    Raises:
        TargetError: If one is missing, superfluous, or was changed.
    """
    if MODEL not in manifest.files or set(manifest.files) - set(FILES):
        raise TargetError(
            f"{folder / MANIFEST} is not valid: files are {sorted(manifest.files)}; compile the model again"
        )
    if (manifest.rows is not None) != (MANY in manifest.files):
        raise TargetError(f"{folder / MANIFEST} is not valid: rows need {MANY}, and it them; compile the model again")
    if (manifest.dense is not None) != (DENSE in manifest.files):
        raise TargetError(f"{folder / MANIFEST} is not valid: dense needs {DENSE}; compile the model again")
    maps = {e.name for e in manifest.inputs if e.dtype == "float32" and e.shape is not None and _is_map(e.shape)}
    if manifest.dense is not None and not manifest.dense.thresholds.keys() <= maps:
        raise TargetError(f"{folder / MANIFEST} is not valid: dense names what is no map; compile the model again")
    for name in FILES:
        path, entry = folder / name, manifest.files.get(name)
        if entry is None:
            continue
        if not path.is_file():
            raise TargetError(f"{path} is missing; compile the model again")
        if path.stat().st_size != entry.bytes or file_hash(path) != entry.sha256:
            raise TargetError(f"{path} was changed or truncated since it was compiled; compile the model again")


def _is_map(shape: Sequence[int | str | None]) -> bool:
    return len(shape) == 4 and all(isinstance(d, int) and d > 0 for d in shape)
