"""What a device has to know of an artifact, read from its manifest whatever the target."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxcomp import native
from onnxcomp.errors import TargetError, UnsupportedError
from onnxcomp.manifest import MANIFEST, tensor_specs
from onnxcomp.state import StateSpec

_MAX_BYTES = 64 << 20
_SAME_ARCH = {"arm64": "aarch64", "amd64": "x86_64", "armv8l": "armv7l", "i386": "i686"}


class _Tensor(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    dtype: str
    shape: list[int | str | None] | None


class _Manifest(BaseModel):
    """The part of a manifest that all targets share; what else it holds is for whoever runs it."""

    model_config = ConfigDict(frozen=True)

    target: str
    triple: str = ""
    gpu: str = ""
    opsets: dict[str, int] = Field(default_factory=dict)
    inputs: list[_Tensor]
    outputs: list[_Tensor]
    state: list[StateSpec] = Field(default_factory=list)


class DeviceArtifact:
    """An artifact that is to be run on a device.

    Args:
        path: Its folder.

    Raises:
        TargetError: If it is not an artifact.
        UnsupportedError: If it is one of a target that no device runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        manifest = _read(self.path / MANIFEST)
        self.target = manifest.target
        self.triple = manifest.triple
        self.gpu = manifest.gpu
        self.is_tvm = manifest.target.startswith("tvm")
        self.needs_native = native.DOMAIN in manifest.opsets
        self.carries_state = bool(manifest.state)
        self.outputs = tuple(t.name for t in manifest.outputs)
        if text := next((t.name for t in manifest.inputs if t.dtype == "string"), None):
            raise UnsupportedError(f"{self.path} takes strings as {text!r}; devices are fed numbers only")
        try:
            self.inputs = tuple(tensor_specs(t.model_dump() for t in manifest.inputs).values())
        except TypeError as error:
            raise TargetError(f"{self.path / MANIFEST} is not valid: {error}; compile the model again") from error
        if not self.is_tvm and manifest.target != "ort-cpu":
            raise UnsupportedError(
                f"{self.path} was compiled for {manifest.target!r}; devices run artifacts of ort-cpu and of the TVM "
                "targets: compile the model for one of them"
            )
        if self.is_tvm and not self.triple:
            raise TargetError(f"{self.path / MANIFEST} names no triple; compile the model again")

    @property
    def arch(self) -> str:
        """Architecture that it needs; empty if any will do."""
        return architecture(self.triple.partition("-")[0]) if self.triple else ""

    def files(self) -> list[Path]:
        """Its files."""
        return sorted(p for p in self.path.iterdir() if p.is_file())


def architecture(name: str) -> str:
    """The name that Linux has for an architecture: `aarch64` for `arm64`."""
    return _SAME_ARCH.get(name, name)


def own_architecture() -> str:
    """Architecture of this machine."""
    return architecture(platform.machine())


def _read(path: Path) -> _Manifest:
    try:
        if not path.is_file():
            raise TargetError(
                f"{path.parent} is not an artifact: it has no {MANIFEST}; make one with: onnxcomp compile"
            )
        if path.stat().st_size > _MAX_BYTES:
            raise TargetError(f"{path} has more than {_MAX_BYTES >> 20} MiB; it was not written by onnxcomp")
        return _Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise TargetError(f"{path} is not valid: {where}: {first['msg']}; compile the model again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{path} cannot be read as JSON ({error}); compile the model again") from error
