"""Bad inputs: each has a message of its own and exit code 2, shows no traceback, and leaves what is there as it was."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest

from onnxcomp.errors import OnnxcompError


@pytest.fixture
def fails(cli, snapshot, tmp_path):
    """Runs the command line, asserts that it fails properly, and gives the message."""

    def call(*arguments, code=2):
        before = snapshot(tmp_path)
        found, out, err = cli(*arguments)
        assert found == code, (out, err)
        assert "Traceback" not in err
        assert out == ""
        assert snapshot(tmp_path) == before
        last = err.splitlines()
        assert last[0].startswith("error: "), err
        return err.removeprefix("error: ")

    return call


# --- models


@pytest.mark.parametrize("verb", ["inspect", "rewrite", "compress", "compile", "profile", "compare"])
def test_every_verb_refuses_what_is_no_model(fails, tmp_path, model_path, data_path, verb):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"this is no protobuf at all")
    options = {
        "rewrite": ["-o", tmp_path / "out.onnx", "--data", data_path],
        "compress": ["-o", tmp_path / "out", "--data", data_path],
        "compile": ["-o", tmp_path / "out"],
        "compare": [model_path, "--data", data_path],
    }
    assert "bad.onnx is not a" in fails(verb, bad, *options.get(verb, []))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an ONNX model: it has no graph"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not an ONNX model"),
        (bytes(1000), "is not an ONNX model"),
    ],
)
def test_other_files(fails, tmp_path, content, message):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    assert message in fails("inspect", path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_truncated(fails, model_path, share):
    content = model_path.read_bytes()
    model_path.write_bytes(content[: int(len(content) * share)])
    assert "mlp.onnx is not a" in fails("inspect", model_path)


def test_missing(fails, tmp_path):
    assert "none.onnx: no such file" in fails("inspect", tmp_path / "none.onnx")
    assert "is not a file" in fails("inspect", tmp_path)


def test_external_data_missing(fails, external_path):
    (external_path.parent / "weights.bin").unlink()
    message = fails("compile", external_path, "-o", external_path.parent / "out")
    assert "the file 'weights.bin' with weight 'w1' is missing" in message


def test_external_data_truncated(fails, external_path):
    os.truncate(external_path.parent / "weights.bin", 1000)
    assert "the file 'weights.bin' with weight 'w1' is truncated" in fails("inspect", external_path)


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(bytes(1 << 16))
    return path


def point_to(path, location, **entries):
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            elif entry.key in entries:
                entry.value = entries[entry.key]
    onnx.save(model, path)


@pytest.mark.parametrize("kind", ["relative", "inner", "absolute", "symlink", "folder"])
def test_external_data_outside_the_folder(fails, external_path, secret, kind):
    folder = external_path.parent
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to(folder.parent)
    location = {
        "relative": "../secret",
        "inner": "x/../../secret",
        "absolute": str(secret),
        "symlink": "link",
        "folder": "up/secret",
    }[kind]
    point_to(external_path, location)
    message = fails("compile", external_path, "-o", folder / "out")
    assert f"the file {location!r} with weight 'w1' lies outside the model's folder" in message


def test_external_data_by_hard_link(fails, external_path, secret):
    (external_path.parent / "weights.bin").unlink()
    os.link(secret, external_path.parent / "weights.bin")
    assert "has several hard links" in fails("inspect", external_path)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        ("-8", "is not a valid ONNX model"),
        ("9000000000000000000", "with weight 'w1' is truncated"),
        ("x", "is not a valid ONNX model"),
    ],
)
def test_external_data_outside_the_file(fails, external_path, offset, message):
    point_to(external_path, "weights.bin", offset=offset)
    assert message in fails("inspect", external_path)


def test_a_symlink_inside_the_folder_is_fine(cli, external_path):
    data = external_path.parent / "weights.bin"
    data.rename(external_path.parent / "blob")
    data.symlink_to("blob")
    assert cli("inspect", external_path)[0] == 0


def test_a_model_that_cannot_run(fails, tmp_path, mlp):
    model = mlp()
    model.graph.node[1].op_type = "NoSuchOp"
    onnx.save(model, tmp_path / "m.onnx")
    assert "NoSuchOp" in fails("compile", tmp_path / "m.onnx", "-o", tmp_path / "out")


def test_a_name_with_terminal_escapes(cli, tmp_path, mlp):
    model = mlp()
    model.graph.node[1].op_type = "\x1b[31mRed\n"
    model.graph.node[1].name = "\x1b]0;title\x07"
    onnx.save(model, tmp_path / "m.onnx")
    for verb in (["inspect", "--select", "name=*"], ["compile", "-o", tmp_path / "out"]):
        _, out, err = cli(verb[0], tmp_path / "m.onnx", *verb[1:])
        assert "\x1b" not in out + err


# --- recipes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[passes]]\npass = "cleanup"\n[[passes]]\npass = "noisy_bias"\n[[passes]]\npass = "quantize"\nbitz = 4',
            "mine.toml: passes[2]: unknown key 'bitz'; quantize has ['activation_bits', ",
        ),
        ('[[passes]]\npass = "quantise"', "passes[0]: unknown pass 'quantise'; did you mean 'quantize'?"),
        ('[[passes]]\npass = "quantize"\nweight_bits = 99', "passes[0].weight_bits: "),
        ("passez = 3", "unknown key 'passez'"),
        ("[[passes]", "is not valid TOML"),
    ],
)
@pytest.mark.parametrize("verb", ["rewrite", "compress"])
def test_recipe(fails, tmp_path, model_path, data_path, verb, text, message):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("version = 1\n" + text, encoding="utf-8")
    found = fails(verb, model_path, "-o", tmp_path / "out", "--recipe", recipe, "--data", data_path)
    assert message in found


def test_recipe_of_another_version(fails, tmp_path, model_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("version = 7\npasses = []", encoding="utf-8")
    message = fails("rewrite", model_path, "-o", tmp_path / "out.onnx", "--recipe", recipe)
    assert "version is 7; this onnxcomp reads 'version = 1'" in message


def test_unknown_recipe_and_target(fails, tmp_path, model_path):
    out = ["-o", tmp_path / "out"]
    assert "unknown recipe 'int9'; did you mean 'int8'?" in fails("compress", model_path, *out, "--recipe", "int9")
    assert "unknown target 'ort-cpi'; did you mean 'ort-cpu'?" in fails("compile", model_path, *out, "-t", "ort-cpi")


# --- data


def save(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input": np.zeros((3, 8), np.float32)}, "the model has no input 'input'; its inputs are ['x']"),
        ({"x": np.zeros((3, 8), np.int64)}, "input 'x' is int64; the model expects float32"),
        ({"x": np.zeros((3, 7), np.float32)}, "input 'x' has shape 1x7; the model expects batchx8"),
        ({"x": np.full((3, 8), np.nan, np.float32)}, "sample 0: input 'x' holds NaN or infinity"),
        ({"x": np.zeros((0, 8), np.float32)}, "is empty"),
        ({"x": np.array([print], dtype=object)}, "'x' holds Python objects, which are not read"),
    ],
)
@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_data(fails, tmp_path, model_path, data_path, recipe_path, option, arrays, message):
    save(tmp_path / "bad.npz", **arrays)
    other = {"--data": "--eval-data", "--eval-data": "--data"}[option]
    arguments = [option, tmp_path / "bad.npz", other, data_path, "--recipe", recipe_path]
    assert message in fails("compress", model_path, "-o", tmp_path / "out", *arguments)


def test_nan_in_a_later_sample_stops_before_the_long_work(fails, tmp_path, model_path, x):
    x[30, 1] = np.nan
    save(tmp_path / "bad.npz", x=x)
    message = fails("compress", model_path, "-o", tmp_path / "out", "--data", tmp_path / "bad.npz")
    assert "bad.npz, sample 30: input 'x' holds NaN" in message


def test_data_that_is_not_there(fails, tmp_path, model_path):
    out = ["-o", tmp_path / "out.onnx"]
    assert "there is no data at" in fails("rewrite", model_path, *out, "--data", tmp_path / "none.npz")
    assert "cannot be imported" in fails("rewrite", model_path, *out, "--data", "no_such_module_3:f")


def test_no_data(fails, tmp_path, model_path):
    message = fails("compress", model_path, "-o", tmp_path / "out")
    assert "pass 'quantize': it needs calibration data; give some with --data" in message


def test_gate_without_data(fails, tmp_path, model_path):
    for gate in ("--max-drop", "--min-sqnr"):
        assert "need evaluation data" in fails("compress", model_path, "-o", tmp_path / "out", gate, "0.1")


def test_a_metric_that_fails(fails, tmp_path, monkeypatch, model_path, data_path, recipe_path):
    (tmp_path / "metrics_1.py").write_text("def broken(run):\n    return {}['top1']\ndef none(run):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    arguments = ["--data", data_path, "--recipe", recipe_path, "--no-measure"]
    for name, reason in {"broken": "KeyError: 'top1'", "none": "TypeError"}.items():
        message = fails("compress", model_path, "-o", "out", *arguments, "--metric", f"metrics_1:{name}")
        assert f"the metric metrics_1:{name} has to return a number" in message
        assert reason in message
    assert "has no function" in fails("compress", model_path, "-o", "out", *arguments, "--metric", "metrics_1:x")
    assert "needs evaluation data" in fails("compress", model_path, "-o", "out", "--metric", "metrics_1:none")


# --- outputs


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


@pytest.fixture
def output(cli, tmp_path, model_path, data_path, recipe_path):
    """An earlier output."""
    out = tmp_path / "out"
    code, _, err = cli("compress", model_path, "-o", out, "--data", data_path, "--recipe", recipe_path, "--no-measure")
    assert code == 0, err
    return out


def test_an_earlier_output_survives(fails, output, model_path, data_path):
    assert "unknown recipe" in fails("compress", model_path, "-o", output, "--data", data_path, "--recipe", "no")
    assert "it needs calibration data" in fails("compress", model_path, "-o", output)


def test_an_earlier_output_is_not_replaced_when_it_holds_the_input(fails, output, data_path):
    message = fails("compress", output / "model.onnx", "-o", output, "--data", data_path)
    assert "model.onnx lies in the folder" in message


# --- options


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


# --- interruption

SLOW = """
import time
from pathlib import Path
import numpy as np

def feeds():
    for i in range(4):
        if any(Path().glob(".out.*")):  # calibration has begun
            Path("begun").touch()
            time.sleep(60)
        yield {"x": np.full((1, 8), i, np.float32)}
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_calibrating(tmp_path, output, snapshot, model_path, recipe_path, number, code):
    (tmp_path / "slow_feeds.py").write_text(SLOW)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = snapshot(output)
    names = {p.name for p in tmp_path.iterdir()}
    process = subprocess.Popen(
        [
            sys.executable, "-B", "-m", "onnxcomp", "compress", str(model_path), "-o", "out",
            "--data", "slow_feeds:feeds", "--recipe", str(recipe_path),
        ],
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert (out, err) == ("", "interrupted: nothing was written\n")
    assert snapshot(output) == before
    assert [p.name for p in temporary.iterdir() if p.name != ".ses"] == []  # which onnxruntime leaves when imported
    assert {p.name for p in tmp_path.iterdir()} == names | {"begun"}
