"""Reports: what they claim, and how they are written."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from reports import EVIL, report, timed

from onnxcomp.compare import Fidelity
from onnxcomp.errors import OnnxcompError
from onnxcomp.profile import Ratio
from onnxcomp.report import REPORT_VERSION, ModelReport, to_html, to_json, to_markdown, write_report
from onnxcomp.select import Select
from onnxcomp.target import Audit


@pytest.mark.parametrize(
    ("ratio", "kind", "text"),
    [
        (timed(0.48, 0.47, 0.50), "faster", "int8 runs in 0.48x of the time of the original (95% interval 0.47-0.50; "),
        (timed(1.30, 1.20, 1.40), "slower", "SLOWER: int8 takes 1.30x the time of the original (95% interval 1.20-1."),
        (timed(0.98, 0.90, 1.05), "same", "no difference beyond noise: 0.98x the time"),
        (timed(1.20, 0.95, 1.40), "same", "no difference beyond noise: 1.20x"),
        (timed(0.99, 0.985, 0.995), "same", "no difference beyond noise: 0.99x"),
        (timed(0.50, 0.50, 0.50, 0.0), "unknown", "50 paired runs on ort-cpu, 1 thread are too few: no claim"),
        (None, "unknown", "latency was not compared on ort-cpu, 1 thread: no claim about speed"),
    ],
)
def test_verdict(ratio: Ratio | None, kind: str, text: str) -> None:
    found = replace(report(), ratio=ratio)
    assert found.verdict.kind == kind
    assert found.verdict.text.startswith(text)
    assert found.verdict.text in " ".join(found.summary().split())
    assert "faster" not in found.summary()
    assert f'class="verdict {kind}"' in to_html(found)


def test_summary() -> None:
    text = report().summary()
    assert max(len(line) for line in text.splitlines()) <= 100
    for row in (
        ("file size", "18.6 MB", "4.80 MB", "0.26x"),
        ("nodes", "80", "40", "0.50x"),
        ("of these in integers, as executed", "0 %", "90.7 %"),
        ("latency p50 (p25-p90)", "10.0 ms (9.60-12.0)", "5.00 ms (4.80-6.00)", "0.48x"),
        ("CPU time p50", "10.0 ms", "5.00 ms", "0.50x"),
        ("peak memory", "90.0 MB", "60.0 MB", "0.67x"),
        ("SQNR, worst output", "19.2 dB"),
        ("top-1 agreement", "93.8 %"),
        ("accuracy", "0.7500", "0.7200", "-0.0300"),
    ):
        assert re.search(r"\s+".join(map(re.escape, row)) + r"\s*$", text, re.MULTILINE), row
    assert "warning: the CPU was busy" in text
    assert "4 quantized nodes of 40 fall back to float:\n  conv33 (Conv): no kernel for conv" in text
    assert "halve: 36 applied, 4 refused" in text


def test_summary_names_only_the_first_fallbacks_and_keeps_within_its_width() -> None:
    text = report(300, name="x" * 130).summary()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "  and 25 more" in text


def test_summary_without_measurements() -> None:
    full = report()
    bare = replace(
        full,
        fidelity=None,
        ratio=None,
        passes=(),
        warnings=(),
        before=replace(full.before, latency=None, peak_memory=None, node_times=()),
        after=replace(full.after, latency=None, peak_memory=None, node_times=(), audit=Audit(rows=())),
    )
    assert "latency p50" not in bare.summary()
    assert "Where the time goes" not in to_html(bare)
    assert "## Fidelity" not in to_markdown(bare)
    assert json.loads(to_json(bare))["fidelity"] is None


def test_nothing_is_claimed_of_what_was_not_audited() -> None:
    full, note = report(), "not audited: no GPU & no driver"
    found = replace(full, after=replace(full.after, audit=Audit(rows=(), note=note), node_times=()))
    (row,) = (r for r in found.rows() if r.label == "of these in integers, as executed")
    assert (row.before, row.after) == ("0 %", "unknown")
    assert f"warning: {note}" in found.summary()
    markdown = to_markdown(found)
    assert markdown.count(note.replace("&", "&amp;")) == 2
    assert "compute nodes" not in markdown
    assert to_html(found).count(note.replace("&", "&amp;")) >= 2
    assert "Read back from the executable" not in to_html(found)
    assert json.loads(to_json(found))["after"]["audit"]["note"] == note


def test_terminal_escapes_in_names_are_taken_out() -> None:
    assert "\x1b" not in report(name=EVIL).summary()
    assert "\x1b" not in to_markdown(report(name=EVIL))


def test_notices_that_follow_from_the_figures() -> None:
    full = report()
    assert full.fidelity is not None
    broken = replace(full.fidelity.outputs[0], non_finite=3, sqnr=-200.0)
    found = replace(
        full,
        after=replace(full.after, file_bytes=20_000_000),
        fidelity=replace(full.fidelity, seen_by_calibration=True, outputs=(broken,)),
    )
    assert found.notices == (
        "the CPU was busy",
        "NaN or infinity in outputs where the original has none: conv",
        "calibration saw the evaluation data: the fidelity is no claim about unseen data",
        "the rewritten model is larger than the original",
    )
    assert "3 NaN or infinite" in to_html(found)


def test_json_round_trip() -> None:
    full = report()
    table = json.loads(to_json(full))
    assert table["report_version"] == REPORT_VERSION
    assert type(table["report_version"]) is int
    assert table["verdict"]["kind"] == "faster"
    assert TypeAdapter(Fidelity).validate_python(table["fidelity"]) == full.fidelity
    assert TypeAdapter(Ratio).validate_python(table["ratio"]) == full.ratio
    assert TypeAdapter(ModelReport).validate_python(table["before"]) == full.before
    assert TypeAdapter(ModelReport).validate_python(table["after"]) == full.after
    assert table["after"]["audit"]["integer_mac_share"] == full.after.audit.integer_mac_share
    (step,) = table["passes"]
    assert (step["applied"], step["refused"], len(step["edits"])) == (36, 4, 40)
    assert Select(**step["config"].pop("where")) == Select(op=[], name=[], module=[], skip=[])  # type: ignore[arg-type]
    assert step["config"] == {"bits": 8, "clip": None, "folder": "weights", "scale": 0.5, "dtype": "INT8"}


def test_json_keys_are_stable() -> None:
    assert sorted(json.loads(to_json(report()))) == [
        "after",
        "artifact",
        "before",
        "calibration",
        "calibration_samples",
        "environment",
        "fidelity",
        "metadata",
        "passes",
        "ratio",
        "recipe",
        "recipe_source",
        "report_version",
        "target",
        "threads",
        "verdict",
        "warnings",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32(np.nan)])
def test_json_has_no_nan(value: float) -> None:
    full = report()
    assert full.fidelity is not None
    text = to_json(replace(full, fidelity=replace(full.fidelity, metric={"accuracy": value})))
    table = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert table["fidelity"]["metric"] == {"accuracy": None}


def test_write_report(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    write_report(report(), folder)
    write_report(report(), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    assert (folder / "report.json").read_text(encoding="utf-8") == to_json(report())
    assert (folder / "report.html").read_text(encoding="utf-8") == to_html(report())


def test_write_report_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(report(), tmp_path)
    old = (tmp_path / "report.json").read_text(encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxcomp.report.os.replace", fail)
    with pytest.raises(OnnxcompError, match=r"cannot write the report to .*: No space left on device"):
        write_report(report(2), tmp_path)
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_write_report_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OnnxcompError, match="cannot write the report"):
        write_report(report(), tmp_path / "file")


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, onnxcomp.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
