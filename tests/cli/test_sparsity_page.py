"""The page of `onnxcomp sparsity --report`: what it holds and escapes, and that it needs nothing from outside."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pages import Page, assert_loads_nothing
from reports import EVIL

from onnxcomp import api, plots
from onnxcomp.errors import OnnxcompError
from onnxcomp.verbs.sparsity import Density, LayerActivity, PerplexityPoint, SparsityProfile
from onnxcomp.verbs.sparsity_page import SHARES, sparsity_page

DENSE = Density(mean=1.0, p5=1.0, p95=1.0, firing=(0, 0, 0, 0, 0, 64))
SPARSE = Density(mean=0.21, p5=0.25, p95=0.5, firing=(4, 5, 6, 7, 20, 22))  # a few tokens pull the mean down
POINTS = ((0.0, 0.0, 10.0), (0.1, 0.25, 10.05), (0.2, 0.5, 10.15), (0.4, 0.9, float("inf")))


def profile(
    blocks: int = 3, *, name: str = "down", natural: Density = DENSE, points: tuple[tuple[float, ...], ...] = POINTS
) -> SparsityProfile:
    layer = LayerActivity(
        node="", activation="silu", gated=True, neurons=64, dead=1, natural=natural, effective=SPARSE,
        tail_errors=tuple(share**2 for share in SHARES),
    )  # fmt: skip
    return SparsityProfile(
        samples=2,
        tokens=512,
        cett=0.2,
        layers=tuple(replace(layer, node=f"{name}{i}") for i in range(blocks)),
        perplexity=tuple(PerplexityPoint(cett=c, sparsity=s, perplexity=p) for c, s, p in points),
        one_percent=0.375 if points else None,
        advice=(f"prune_dead removes {name}",),
    )


def html(found: SparsityProfile, *, model: str = "model.onnx", data: str = "tokens.npy") -> str:
    return sparsity_page(found, model=model, data=data)


@pytest.fixture(params=[True, False], ids=["matplotlib", "tables"])
def _plotting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(plots, "available", lambda: False)
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("_plotting")
@pytest.mark.parametrize("blocks", [1, 30, 80])
@pytest.mark.parametrize("natural", [DENSE, SPARSE], ids=["silu", "relu"])
def test_well_formed_and_complete(blocks: int, natural: Density) -> None:
    text = html(profile(blocks, natural=natural))
    page = Page(text)
    assert page.open == []
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert [f"<code>down{i}</code>" in text for i in range(blocks + 1)] == [True] * blocks + [False]
    for shown in ("<b>512</b> tokens", "prune_dead removes down", "21.0 %", "25.0 % - 50.0 %", "37.5 %", "10.150"):
        assert shown in text
    assert text.count("<h3>not zero</h3>") == (natural is SPARSE), "nothing to see where all fire"


@pytest.mark.usefixtures("_plotting")
def test_loads_nothing() -> None:
    assert_loads_nothing(html(profile()))


@pytest.mark.usefixtures("_plotting")
def test_escapes_names() -> None:
    text = html(profile(name=EVIL), model=EVIL, data=EVIL)
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "</style><script" not in text
    assert text.count("<script>") == 1  # its own


def test_plots_or_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = html(profile())
    assert drawn.count("<svg") == 4
    assert "onnxcomp[plot]" not in drawn
    assert html(profile(points=())).count("<svg") == 3
    assert "1 % more perplexity" not in html(profile(points=()))
    monkeypatch.setattr(plots, "available", lambda: False)
    without = html(profile())
    assert "<svg" not in without
    assert "pip install onnxcomp[plot]" in without
    assert without.count("<details open>") == 2  # what plots show otherwise


def test_plots_of_extremes() -> None:
    pytest.importorskip("matplotlib")
    hopeless = ((0.0, 0.0, float("inf")), (0.1, 0.2, float("inf")))
    assert html(profile(points=hopeless)).count("<svg") == 3
    assert "<svg" in plots.tail_errors(SHARES, [[0.0] * len(SHARES)], 0.0)
    assert "<svg" in plots.perplexities([(0.0, 10.0)], 10.1, None)


@pytest.mark.usefixtures("_plotting")
def test_same_profile_same_bytes(tmp_path: Path) -> None:
    for path in (tmp_path / "a.html", tmp_path / "b.HTML"):
        api.write_sparsity_page(profile(), path, model="m.onnx", data="tokens")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.HTML").read_bytes()


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old", encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("onnxcomp.report.os.replace", fail)
        with pytest.raises(OnnxcompError, match=r"cannot write .*page\.html: No space left on device"):
            api.write_sparsity_page(profile(), path)
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("page.html", "old")]
    api.write_sparsity_page(profile(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert "down2" in path.read_text(encoding="utf-8")


def test_command(cli, as_json, model_path, data_path, tmp_path) -> None:
    page = tmp_path / "page.html"
    options = ("sparsity", model_path, "--data", data_path, "--report", page)
    code, out, err = cli(*options)
    assert (code, err) == (0, "")
    assert out.endswith(f"report: {page}\n")
    written = page.read_text(encoding="utf-8")
    assert "/fc2/Gemm" in written
    assert model_path.name in written
    assert str(data_path) in written
    page.unlink()
    (layer,) = as_json(*options)["layers"]
    assert layer["node"] == "/fc2/Gemm"
    assert page.read_text(encoding="utf-8") == written


def test_refused_before_anything_is_measured(fails, model_path, tmp_path) -> None:
    def told(page: Path) -> str:
        return fails("sparsity", model_path, "--data", tmp_path / "none.npz", "--report", page)

    assert "ends in .html" in told(tmp_path / "page.pdf")
    assert "ends in .html" in told(tmp_path)
    assert "there is no folder" in told(tmp_path / "none" / "page.html")
    (tmp_path / "folder.html").mkdir()
    assert "is a folder" in told(tmp_path / "folder.html")
