"""The manifest of an artifact: what all targets note there, how it is written, and how it is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxcomp.errors import TargetError
from onnxcomp.model import file_hash
from onnxcomp.state import StateSpec
from onnxcomp.target import MANIFEST_VERSION, Artifact, Audit, AuditRow, TensorSpec

MANIFEST = "manifest.json"

_MAX_BYTES = 64 << 20

DType = Literal[
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "string",
    "uint8", "uint16", "uint32", "uint64",
]  # fmt: skip


class Strict(BaseModel):
    """Base of what is read from JSON: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(Strict):
    """One file of the artifact."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorEntry(Strict):
    """One input or output; a dimension that is not fixed is a name or null."""

    name: str
    dtype: DType
    shape: list[int | str | None] | None


class RowEntry(Strict):
    """One row of the audit."""

    node: str
    op_type: str
    executed_as: str
    macs: int = Field(ge=0)
    quantized: bool
    integer: bool
    reason: str
    executed_name: str = ""


class BaseManifest(Strict):
    """What every target writes to `manifest.json`.

    Attributes:
        manifest_version: Format of this file.
        target: Name of the target.
        versions: Package to version that compiled it.
        features: Instruction sets of the CPU that it was compiled for.
        files: File name to size and hash.
        inputs: What a feed gives, state excluded.
        outputs: What a run returns, state excluded.
        state: Streaming state.
        executed_ops: Op type to number of nodes in the executable.
        audit: What each compute node became.
        unaudited: Why the audit is empty; empty if there is one.
    """

    manifest_version: Literal[1]
    target: str
    versions: dict[str, str]
    features: list[str]
    files: dict[str, FileEntry]
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    state: list[StateSpec]
    executed_ops: dict[str, int]
    audit: list[RowEntry]
    unaudited: str = ""

    def to_audit(self) -> Audit:
        """The audit as the core knows it."""
        return Audit(
            rows=tuple(AuditRow(**row.model_dump()) for row in self.audit),
            executed_ops=dict(self.executed_ops),
            note=self.unaudited,
        )


_Manifest = TypeVar("_Manifest", bound=BaseManifest)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
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


def tensor_specs(entries: Iterable[Mapping[str, Any]]) -> dict[str, TensorSpec]:
    """Specs by name, of inputs or outputs as a manifest has them."""
    found: dict[str, TensorSpec] = {}
    for entry in entries:
        dtype = np.dtype(object) if entry["dtype"] == "string" else np.dtype(entry["dtype"])
        shape = None if entry["shape"] is None else tuple(entry["shape"])
        found[entry["name"]] = TensorSpec(name=entry["name"], dtype=dtype, shape=shape)
    return found


def write_manifest(
    kind: type[_Manifest],
    folder: Path,
    audit: Audit,
    *,
    files: Collection[str],
    packages: Iterable[str],
    **fields: Any,
) -> _Manifest:
    """Writes `manifest.json` and returns what was written, validated.

    Args:
        kind: The target's manifest.
        folder: The artifact.
        audit: What each compute node became.
        files: Names of the artifact's files, those that are there are noted.
        packages: Those whose versions are noted.
        **fields: The others.
    """
    there = [name for name in files if (folder / name).is_file()]
    manifest = kind.model_validate(
        {
            "manifest_version": MANIFEST_VERSION,
            "versions": versions(packages),
            "files": {n: {"bytes": (folder / n).stat().st_size, "sha256": file_hash(folder / n)} for n in there},
            "executed_ops": dict(audit.executed_ops),
            "audit": [asdict(row) for row in audit.rows],
            "unaudited": audit.note,
            **fields,
        }
    )
    text = json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def read_manifest(kind: type[_Manifest], folder: Path, target: str) -> _Manifest:
    """Reads `manifest.json` of an artifact of `target`; the other files are not looked at.

    Raises:
        TargetError: If there is none, or it is not valid.
    """
    path = folder / MANIFEST
    data = _json(path)
    _check_head(path, data, target)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise TargetError(f"{path} is not valid: {where}: {first['msg']}; compile the model again") from error


def artifact_target(folder: Path) -> str:
    """Name of the target that an artifact is for.

    Raises:
        TargetError: If it is no artifact.
    """
    data = _json(folder / MANIFEST)
    name = data.get("target") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise TargetError(f"{folder / MANIFEST} names no target; compile the model again")
    return name


def _json(path: Path) -> object:
    try:
        if not path.is_file():
            raise TargetError(
                f"{path.parent} is not an artifact: it has no {MANIFEST}; make one with: onnxcomp compile"
            )
        if path.stat().st_size > _MAX_BYTES:
            raise TargetError(f"{path} has more than {_MAX_BYTES >> 20} MiB; it was not written by onnxcomp")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{path} cannot be read as JSON ({error}); compile the model again") from error


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


def check_file(path: Path, entry: FileEntry) -> None:
    """Compares a file with what the manifest says of it.

    Raises:
        TargetError: If it is missing, or was changed.
    """
    if not path.is_file():
        raise TargetError(f"{path} is missing; compile the model again")
    if path.stat().st_size != entry.bytes or file_hash(path) != entry.sha256:
        raise TargetError(f"{path} was changed or truncated since it was compiled; compile the model again")


def model_hash(artifact: Artifact) -> str:
    """Hash over those of all files of an artifact: weights that lie beside the model may differ alone."""
    entries = sorted(f"{name} {entry['sha256']}" for name, entry in artifact.manifest["files"].items())
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()
