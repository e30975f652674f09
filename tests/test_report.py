"""Reports: what they claim, what they escape, and that they need nothing from outside."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import TypeAdapter

from onnxcomp import plots
from onnxcomp.compare import Fidelity, LayerFidelity, TensorFidelity
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import ModelSize
from onnxcomp.profile import Latency, Ratio
from onnxcomp.report import REPORT_VERSION, ModelReport, Report, to_html, to_json, to_markdown, write_report
from onnxcomp.rewrite import Context, Edit, Pass, PassReport
from onnxcomp.select import Select
from onnxcomp.target import Audit, AuditRow, NodeTime

EVIL = "</style><script>alert(1)</script>|`[x](y)\x1b[31m$\\alpha$"


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "Halves."

    bits: int = 8
    clip: float = math.inf
    folder: Path = Path("weights")
    scale: np.float32 = np.float32(0.5)  # noqa: RUF009, immutable
    dtype: ir.DataType = ir.DataType.INT8

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        return []


def latency(ms: float) -> Latency:
    return Latency.of([round(ms * 1e6 * f) for f in (0.9, 0.96, 1.0, 1.1, 1.2)], [round(ms * 1e6)] * 5)


def timed(median: float, low: float, high: float, confidence: float = 0.95) -> Ratio:
    return Ratio(median=median, low=low, high=high, confidence=confidence, rounds=50)


def size(nodes: int) -> ModelSize:
    return ModelSize(nodes=nodes, ops={"Conv": nodes}, weight_bytes=4 * nodes, parameters=nodes, macs=1000 * nodes)


def report(layers: int = 40, *, name: str = "conv", ratio: Ratio | None = None) -> Report:
    names = [f"{name}{i}" for i in range(layers)]
    rows = tuple(
        AuditRow(
            node=n,
            op_type="Conv",
            executed_as="Conv" if i % 10 == 3 else "QLinearConv",
            macs=1000 * (i + 1),
            quantized=True,
            integer=i % 10 != 3,
            reason=f"no kernel for {name}" if i % 10 == 3 else "",
        )
        for i, n in enumerate(names)
    )
    times = tuple(NodeTime(node=n, op_type="Conv", microseconds=10.0 + i) for i, n in enumerate(names))
    edits = tuple(
        Edit(
            action="refused" if i % 10 == 5 else "applied",
            node=n,
            op_type="Conv",
            detail=f"weight of {name} is not constant" if i % 10 == 5 else "halved",
        )
        for i, n in enumerate(names)
    )
    return Report(
        recipe="int8",
        target="ort-cpu",
        threads=1,
        environment={"onnxruntime": "1.32", name: name},
        before=ModelReport(
            path="in/net.onnx",
            file_bytes=18_600_000,
            size=size(2 * layers),
            audit=Audit(rows=tuple(replace(r, quantized=False, integer=False, reason="") for r in rows)),
            latency=latency(10.0),
            peak_memory=90_000_000,
            node_times=times,
        ),
        after=ModelReport(
            path="out/net.onnx",
            file_bytes=4_800_000,
            size=size(layers),
            audit=Audit(rows=rows),
            latency=latency(5.0),
            peak_memory=60_000_000,
            node_times=tuple(replace(t, op_type="QLinearConv", microseconds=t.microseconds / 2) for t in times),
        ),
        passes=(PassReport(name="halve", config=Halve(), edits=edits, size=size(layers), seconds=1.5),),
        fidelity=Fidelity(
            data="val.npz",
            samples=64,
            seen_by_calibration=False,
            outputs=(
                TensorFidelity(name=name, sqnr=19.25, cosine=0.99, max_error=1.5, top1=0.9375, kl=0.03),
                TensorFidelity(name="box", sqnr=30.0, cosine=1.0, max_error=0.5),
            ),
            layers=tuple(
                LayerFidelity(node=n, op_type="Conv", value=n, sqnr=40.0 - 0.1 * i) for i, n in enumerate(names)
            ),
            reference_metric={"accuracy": 0.75},
            metric={"accuracy": 0.72},
        ),
        ratio=ratio or timed(0.48, 0.47, 0.5),
        calibration="train.npz",
        calibration_samples=32,
        warnings=("the CPU was busy",),
        recipe_source='version = 1\n[[passes]]\npass = "halve"\n',
    )


class Page(HTMLParser):
    """Tags and attributes of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(params=[True, False], ids=["matplotlib", "tables"])
def _plotting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


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


@pytest.mark.parametrize("name", ["conv", EVIL])
def test_markdown_tables_are_rectangular(name: str) -> None:
    text = to_markdown(report(name=name))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 6
    for table in tables:
        rows = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, table
        assert re.fullmatch(r"\|(?:-+:?\|)+", rows[1])
    assert "| file size | 18.6 MB | 4.80 MB | 0.26x |" in text
    assert "- warning: the CPU was busy" in text
    assert re.search(r"^- halve refused 4: weight of .* is not constant \(e\.g\. `", text, re.MULTILINE)


def test_markdown_escapes_names_outside_of_code() -> None:
    text = re.sub(r"`[^`\n]*`", "", to_markdown(report(name=EVIL)).replace("\\`", ""))
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\[x", text)


@pytest.mark.usefixtures("_plotting")
@pytest.mark.parametrize("layers", [1, 2, 40, 300])
def test_html_is_well_formed_and_complete(layers: int) -> None:
    page = Page(to_html(report(layers)))
    assert page.open == []
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {"main", "h1", "section", "details", "input"} <= {tag for tag, _ in page.tags}


@pytest.mark.usefixtures("_plotting")
def test_html_loads_nothing() -> None:
    text = to_html(report())
    assert not re.search(r"(?i)\b(?:https?|ftp|file):|@import|//\w", re.sub(r'xmlns(?::\w+)?="[^"]*"', "", text))
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "xlink:href"):
                assert (value or "").startswith("#")
    assert "default-src 'none'" in text


@pytest.mark.usefixtures("_plotting")
def test_html_escapes_names_from_the_model() -> None:
    text = to_html(report(2, name=EVIL)) + to_html(report(40, name=EVIL))
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "</style><script" not in text
    assert text.count("<script>") == 2  # its own, one a page


def test_html_shows_plots_or_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert to_html(report()).count("<svg") == 3
    assert "onnxcomp[plot]" not in to_html(report())
    monkeypatch.setattr(plots, "available", lambda: False)
    without = to_html(report())
    assert "<svg" not in without
    assert "pip install onnxcomp[plot]" in without
    assert without.count('class="bars"') == 4  # layers, op types, slowest nodes before and after


def test_html_lists_fallbacks_first() -> None:
    text = to_html(report())
    table = text[text.index('<table id="audit">') :]
    assert re.findall(r"<code>(\w+)</code>", table)[:5] == ["conv33", "conv23", "conv13", "conv3", "conv39"]


def test_plots_are_deterministic_and_take_the_colours_of_the_page() -> None:
    pytest.importorskip("matplotlib")
    first, second = (plots.layers(report().fidelity.layers, ()) for _ in range(2))  # type: ignore[union-attr]
    assert first == second
    assert "currentColor" in first
    assert "#010203" not in first
    assert re.match(r"<svg [^>]*viewBox", first)
    assert not re.search(r'<svg [^>]*\bwidth="', first)
    assert "<metadata" not in first


def test_plots_ignore_the_users_style() -> None:
    mpl = pytest.importorskip("matplotlib")
    layers = [LayerFidelity(node="a", op_type="Conv", value="a", sqnr=20.0)]
    plain = plots.layers(layers, ())
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert plots.layers(layers, ()) == plain
        assert mpl.rcParams["font.size"] == 30


def test_plots_of_exact_and_broken_layers() -> None:
    pytest.importorskip("matplotlib")
    layers = [LayerFidelity(node=f"n{s}", op_type="Conv", value="v", sqnr=s) for s in (200.0, -200.0, 30.0)]
    assert "n200.0" in plots.layers(layers, layers[1:2])


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
