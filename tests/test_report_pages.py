"""Reports as Markdown and HTML: what they escape, and that they need nothing from outside."""

import re
import sys

import pytest
from pages import Page, assert_loads_nothing
from reports import EVIL, report

from onnxcomp import plots
from onnxcomp.compare import LayerFidelity
from onnxcomp.report import to_html, to_markdown


@pytest.fixture(params=[True, False], ids=["matplotlib", "tables"])
def _plotting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


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
    assert_loads_nothing(to_html(report()))


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
