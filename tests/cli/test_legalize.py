"""The verb `legalize`: what it prints, and when it fails."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from foreign import TOOLS
from stubs import ScaleLittle, ScaleMuch, register

from onnxcomp.model import save
from onnxcomp.target import Audit, AuditRow
from onnxcomp.verbs import legalization
from onnxcomp.verbs.closeness import fidelity_to


@pytest.fixture
def little(monkeypatch):
    """The pass changes next to nothing."""
    register(monkeypatch, ScaleLittle)


@pytest.fixture
def much(monkeypatch):
    """The pass breaks the model."""
    register(monkeypatch, ScaleMuch)


@pytest.fixture
def audits(monkeypatch):
    """Audits of a model of two layers, one of which is in float at first."""
    rows = [
        AuditRow(node=f"fc{i}", op_type="Gemm", executed_as="Gemm", macs=100 * i, quantized=True, integer=True)
        for i in (1, 3)
    ]
    slow = AuditRow(
        node="fc3", op_type="Gemm", executed_as="Gemm", macs=300, quantized=True, integer=False, reason="no kernel"
    )
    found = [Audit(rows=(rows[0], slow)), Audit(rows=tuple(rows))]
    monkeypatch.setattr(legalization, "audited", lambda *_: (None, found.pop(0)))


@pytest.mark.usefixtures("little", "audits")
def test_what_is_printed(cli, tmp_path, model_path, data_path):
    code, out, err = cli("legalize", model_path, "-o", tmp_path / "out.onnx", "--data", data_path)
    assert (code, err) == (0, "")
    for line in (
        "legalize: 2 applied, 1 refused",
        "before: 1 of 2 linear nodes run on integers on ort-cpu, 25.0% of MACs; 1 are quantized and run in float",
        "after: 2 of 2 linear nodes run on integers on ort-cpu, 100.0% of MACs; 0 are quantized and run in float",
        f"dB to the original (32 samples of {data_path})",
        f"wrote {tmp_path / 'out.onnx'}",
    ):
        assert line in out
    assert out.count("no kernel") == 1
    assert "optimizer" not in out
    assert "without rounding" not in out
    assert "after / before" not in out
    assert (tmp_path / "out.onnx").is_file()


@pytest.mark.usefixtures("little", "audits")
def test_json(as_json, tmp_path, model_path, data_path):
    options = ["--data", data_path, "--profile", "--repeat", "6", "--samples", "4"]
    found = as_json("legalize", model_path, "-o", tmp_path / "out.onnx", *options)
    assert found["path"] == str(tmp_path / "out.onnx")
    assert [found[k]["integer_mac_share"] for k in ("before", "after")] == [0.25, 1.0]
    assert found["before"]["rows"][1]["reason"] == "no kernel"
    assert (found["accepted"], found["min_sqnr"], found["fidelity"]["samples"]) == (True, 30.0, 4)
    assert found["runtime"]["outputs"][0]["sqnr"] > 100
    assert (found["reference"], found["to_reference"], found["exact"], found["refused_sqnr"]) == ("", {}, False, None)
    assert found["ratio"]["rounds"] == 6
    assert [p["name"] for p in found["passes"]] == ["cleanup", "legalize"]
    assert "model" not in found


@pytest.mark.usefixtures("little")
def test_profile(cli, model_path, data_path):
    code, out, _ = cli("legalize", model_path, "--dry-run", "--data", data_path, "--profile", "--repeat", "6")
    assert code == 0
    assert "after / before: " in out
    assert "6 rounds" in out


@pytest.mark.usefixtures("much")
@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--json"]])
def test_outputs_that_differ(cli, tmp_path, model_path, data_path, snapshot, options):
    before = snapshot(tmp_path)
    arguments = ["legalize", model_path, "-o", tmp_path / "out.onnx", "--data", data_path]
    code, out, err = cli(*arguments, *options)
    assert code == 3
    assert err.startswith("gate failed: SQNR is ")
    assert err.endswith("dB, below --min-sqnr 30.0; nothing was written\n")
    assert "wrote" not in out
    assert snapshot(tmp_path) == before
    if options == ["--json"]:
        assert json.loads(out)["accepted"] is False
    assert cli(*arguments, *options, "--min-sqnr", "1")[0] == 0


@pytest.fixture
def other_tool(tmp_path):
    """A model of another tool, the option that names it, and data."""
    model, feed = TOOLS["quark"]()
    save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "images.npz", **feed)
    return [tmp_path / "model.onnx", "--data", tmp_path / "images.npz", "--min-sqnr", "100"]


def test_what_the_original_stands_for(cli, as_json, tmp_path, other_tool):
    """With the real pass."""
    code, out, err = cli("legalize", *other_tool, "-o", tmp_path / "out.onnx")
    assert (code, err) == (0, "")
    assert re.search(
        r"outputs: SQNR (3|4)\d\.\d dB before and (3|4)\d\.\d dB after, to the original without rounding", out
    )
    found = as_json("legalize", *other_tool, "--dry-run")
    assert found["reference"] == "the original without rounding"
    assert list(found["to_reference"]) == ["before", "after"]
    assert found["accepted"]


def test_exact_instead(cli, tmp_path, other_tool):
    """Another model, for which only the exact rewrite is accepted: with the real pass."""
    save(TOOLS["qoperator"]()[0], tmp_path / "model.onnx")
    code, out, err = cli("legalize", *other_tool, "-o", tmp_path / "out.onnx")
    assert (code, err) == (0, "")
    assert "every integer was kept, as with --exact: SQNR was 3" in out
    assert f"wrote {tmp_path / 'out.onnx'}" in out


@pytest.mark.usefixtures("little")
def test_what_the_optimizer_changes(cli, monkeypatch, model_path, data_path):
    found = []

    def fidelity(*arguments):
        found.append(fidelity_to(*arguments))
        output = found[0].outputs[0]
        return found[0] if len(found) == 1 else replace(found[0], outputs=(replace(output, sqnr=-0.45),))

    monkeypatch.setattr(legalization, "fidelity_to", fidelity)
    code, out, _ = cli("legalize", model_path, "--dry-run", "--data", data_path)
    assert code == 0
    assert "the runtime's optimizer changes this model's outputs: SQNR -0.5 dB on ort-cpu to what the file says" in out


@pytest.mark.usefixtures("much")
def test_a_reference(cli, fails, tmp_path, model_path, data_path):
    """The model itself, which the rewrite moves away from."""
    arguments = ["legalize", model_path, "-o", tmp_path / "out.onnx", "--data", data_path, "--reference"]
    code, out, err = cli(*arguments, model_path)
    assert code == 3
    assert re.search(r"SQNR 200\.0 dB before and \d+\.\d dB after, to the reference", out)
    assert re.fullmatch(
        r"gate failed: SQNR is \d+\.\d dB, below --min-sqnr 30\.0, and \d+\.\d dB to the reference, "
        r"where the original has 200\.0 dB; nothing was written\n",
        err,
    )
    assert "none.onnx: no such file" in fails(*arguments, tmp_path / "none.onnx")


@pytest.mark.usefixtures("little")
def test_a_dry_run(cli, tmp_path, model_path, data_path, snapshot):
    before = snapshot(tmp_path)
    code, out, err = cli("legalize", model_path, "--data", data_path, "--dry-run")
    assert (code, err) == (0, "")
    assert "dry run: nothing was written" in out
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("little")
def test_data_that_tells_little_is_warned_of(cli, model_path):
    _, out, err = cli("legalize", model_path, "--dry-run")
    assert err == "warning: no data: the outputs are compared on random inputs; give some with --data\n"
    assert "16 samples of random data" in out
    assert cli("legalize", model_path, "--dry-run", "--data", "random")[2].startswith("warning: random data")


@pytest.mark.usefixtures("little")
def test_what_is_refused(fails, tmp_path, model_path, data_path):
    assert "give the file to write with -o, or --dry-run" in fails("legalize", model_path)
    (tmp_path / "bad.onnx").write_bytes(b"this is no protobuf at all")
    assert "bad.onnx is not a" in fails("legalize", tmp_path / "bad.onnx", "-o", tmp_path / "m.onnx", "-d", data_path)
