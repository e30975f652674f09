"""Bad outputs and options: each has a message of its own and exit code 2, and leaves what is there as it was."""

import pytest

from onnxcomp.errors import OnnxcompError


def test_output_that_cannot_be_written(fails, tmp_path, model_path, data_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    data = ["--data", data_path]
    for place in (blocked / "out", "/proc/out", "/proc/none/out"):
        assert "cannot write" in fails("compress", model_path, "-o", place, *data)
        assert "cannot write" in fails("rewrite", model_path, "-o", place, *data)
    assert "is a file; give the name of a folder" in fails("compress", model_path, "-o", blocked, *data)
    assert "is a folder; give the name of a file" in fails("rewrite", model_path, "-o", tmp_path, *data)
    assert "there is no folder" in fails("rewrite", model_path, "-o", tmp_path / "none" / "m.onnx", *data)


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["report.json"],
        ["report.json", "model.onnx", "notes.txt"],
    ],
)
def test_a_folder_that_is_not_ours(fails, tmp_path, model_path, data_path, names):
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("{}")
    message = fails("compress", model_path, "-o", out, "--data", data_path)
    assert "is not empty and holds no earlier output of onnxcomp" in message


def test_the_current_folder(fails, tmp_path, monkeypatch, model_path, data_path):
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for place in (".", ".."):
        assert "is the current folder, or holds it" in fails("compress", model_path, "-o", place, "--data", data_path)


def test_parents_that_were_made_are_removed_again(fails, tmp_path, model_path):
    fails("compress", model_path, "-o", tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()


def test_an_earlier_output_survives(fails, output, model_path, data_path):
    assert "unknown recipe" in fails("compress", model_path, "-o", output, "--data", data_path, "--recipe", "no")
    assert "it needs calibration data" in fails("compress", model_path, "-o", output)


def test_an_earlier_output_is_not_replaced_when_it_holds_the_input(fails, output, data_path):
    message = fails("compress", output / "model.onnx", "-o", output, "--data", data_path)
    assert "model.onnx lies in the folder" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x=1xb"], "--input 'x=1xb' is not of the form name=1x3x224x224"),
        (["--input", "x"], "is not of the form name=1x3x224x224"),
        (["--input", "=1x8"], "is not of the form name=1x3x224x224"),
        (["--input", "x=0x8"], "is not of the form name=1x3x224x224"),
        (["--input", "x=1x8", "--input", "x=2x8"], "--input 'x' is given twice"),
        (["--input", "z=1x8"], "the model has no input 'z'; it has ['x']"),
        (["--input", "x=1x9"], "input 'x' has a fixed dimension 8 on axis 1, not 9"),
        (["--select", "ops=Conv"], "--select 'ops=Conv' is not of the form op=, name=, module= or skip="),
        (["--select", "op="], "is not of the form"),
        (["--select", "op=re:("], "'re:(' is not a regular expression"),
    ],
)
def test_options(fails, model_path, arguments, message):
    assert message in fails("inspect", model_path, *arguments)


def test_check_and_list(fails, model_path, tmp_path):
    message = fails("rewrite", model_path, "-o", tmp_path / "m.onnx", "--check", "all")
    assert "--check 'all': it has to be none, graph or numeric" in message
    assert "there is no list of 'pass'; there is passes, targets, recipes, ops" in fails("list", "pass")
    assert "give the file to write with -o, or --dry-run" in fails("rewrite", model_path)


@pytest.mark.parametrize(
    "arguments",
    [["compress"], ["nonsense"], ["inspect"], ["compare", "a.onnx", "b.onnx"], ["rewrite", "--samples", "0"]],
)
def test_usage(cli, arguments):
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage" in err


def test_debug_shows_the_traceback(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("ONNXCOMP_DEBUG", "1")
    code, _, err = cli("inspect", tmp_path / "none.onnx")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_all_errors_share_a_root():
    from onnxcomp import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    assert len(kinds) > 5
    assert all(issubclass(k, OnnxcompError) for k in kinds)
