"""The manifest of an onnxruntime artifact: what it notes besides what all do, and how it fits the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from onnxcomp.errors import TargetError
from onnxcomp.manifest import MANIFEST, BaseManifest, check_file
from onnxcomp.target import Artifact, Feed
from onnxcomp.targets.ort.dense_steps import DenseSteps
from onnxcomp.targets.ort.providers import CPU_ONLY, Provider
from onnxcomp.targets.ort.rows import Rows

PACKAGES = ("onnxcomp", "onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir")
"""Those that an audit depends on."""
MODEL = "model.onnx"
DATA = "model.onnx.data"
MANY = "many.onnx"
"""The model for feeds of many rows, where that is another one; it shares weights in `DATA`."""
MANY_DATA = "many.onnx.data"
DENSE = "dense.onnx"
"""The model for steps of a stream in which much changes."""
DENSE_DATA = "dense.onnx.data"
FILES = (MODEL, DATA, MANY, MANY_DATA, DENSE, DENSE_DATA)


class Manifest(BaseManifest):
    """Content of `manifest.json`; the audit holds for the onnxruntime and the CPU that it was compiled with.

    Attributes:
        opsets: Op domain to version.
        rows: Tells feeds for `MANY` from those for `MODEL`, if there are both.
        dense: Tells steps for `DENSE` from those for `MODEL`, if there are both.
        providers: What onnxruntime runs it with, with the options of each.
    """

    opsets: dict[str, int]
    rows: Rows | None = None
    dense: DenseSteps | None = None
    providers: list[Provider] = Field(default_factory=lambda: list(CPU_ONLY), min_length=1)


def providers_of(artifact: Artifact) -> tuple[Provider, ...]:
    """What an artifact is run with."""
    return tuple(Provider.model_validate(entry) for entry in artifact.manifest["providers"])


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
        check_file(path, entry)


def _is_map(shape: Sequence[int | str | None]) -> bool:
    return len(shape) == 4 and all(isinstance(d, int) and d > 0 for d in shape)
