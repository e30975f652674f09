"""Real models: cleanup keeps their function, int8 gives what runs, and nothing but an `OnnxcompError` comes out.

The models are not part of the repository: `ONNXCOMP_ZOO` names their folder, `../shared/zoo` is taken otherwise.
`python -m tests.corpus.test_zoo` prints a table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.api import compile, rewrite
from onnxcomp.errors import OnnxcompError
from tests.corpus.harness import ZOO, differences, run_all, valid_feeds, worst_sqnr

MODELS = sorted(ZOO.glob("*.onnx")) if ZOO.is_dir() else []
FEEDS = 4
RTOL = 1e-4
"""Of the largest magnitude of an output: BatchNorm and scales are folded, which rounds in another place."""


@dataclass(frozen=True)
class Row:
    """What became of a model.

    Attributes:
        cleanup: `same`, the differences, or why it was refused.
        int8: Likewise, with the numbers of edits made and refused.
        share: Share of multiply-accumulates that run on integers.
        sqnr: Of the worst output in dB; NaN if no output is floating point.
    """

    cleanup: str
    int8: str = ""
    share: float = 0.0
    sqnr: float = float("nan")


def examine(path: Path, folder: Path) -> Row:
    """Cleans up and quantizes a model and runs both."""
    feeds = valid_feeds(path, FEEDS)
    before = run_all(path, feeds)
    result = folder / "result.onnx"
    try:
        rewrite(path, result, recipe="cleanup")
    except OnnxcompError as error:
        return Row(f"refused: {error}")
    found = [*_changes(before, run_all(result, feeds)), *_changes(before, run_all(result, feeds, optimize=True))]
    cleanup = "; ".join(found) or "same"
    try:
        report = rewrite(path, result, recipe="int8", data=feeds)
    except OnnxcompError as error:
        return Row(cleanup, f"refused: {error}")
    after = run_all(result, feeds, optimize=True)
    actions = [e.action for e in report.passes[-1].edits]
    return Row(
        cleanup,
        f"{actions.count('applied')} applied, {actions.count('refused')} refused",
        compile(result, folder / "artifact").audit.integer_mac_share,
        min(worst_sqnr(a, b) for a, b in zip(before, after, strict=True)),
    )


def _changes(before: list[list[object]], after: list[list[object]]) -> list[str]:
    return [text for a, b in zip(before, after, strict=True) for text in differences(a, b, RTOL)]


@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason="there are no models at ONNXCOMP_ZOO or ../shared/zoo")
@pytest.mark.parametrize("path", MODELS, ids=[p.stem[:60] for p in MODELS])
def test_real_model(path, tmp_path):
    row = examine(path, tmp_path)
    assert row.cleanup == "same"
    assert "refused:" not in row.int8
    assert np.isnan(row.sqnr) or row.sqnr > 5.0, "int8 is still about the same function"


def print_table(paths: Sequence[Path]) -> None:
    known = {m["file"]: m for m in json.loads((ZOO / "manifest.json").read_text())} if paths else {}
    print(f"{'model':44} {'opset':>5} {'exporter':22} {'cleanup':8} {'int8':24} {'integer':>7} {'SQNR':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            row = examine(path, Path(folder))
            opset = max(o.version for o in onnx.load(path).opset_import if o.domain in ("", "ai.onnx"))
            name = path.name.partition("__")[2].removesuffix(".onnx")[:44]
            exporter = str(known.get(path.name, {}).get("producer", ""))[:22]
            figures = f"{row.share:7.1%} {row.sqnr:6.1f}"
            print(f"{name:44} {opset:5} {exporter:22} {row.cleanup:8} {row.int8:24} {figures}", flush=True)


if __name__ == "__main__":
    print_table(MODELS)
