"""The command line as such: versions, imports, terminals and pipes."""

import json
import os
import subprocess
import sys

import pytest

from onnxcomp import __version__


def test_version(cli):
    assert cli("--version") == (0, f"onnxcomp {__version__}\n", "")


def test_help(cli):
    for arguments in ([], ["--help"]):
        _, out, err = cli(*arguments)
        for verb in (
            "export",
            "inspect",
            "rewrite",
            "legalize",
            "compile",
            "profile",
            "compare",
            "compress",
            "list",
            "doctor",
        ):
            assert verb in out + err


def test_module():
    done = subprocess.run([sys.executable, "-m", "onnxcomp", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"onnxcomp {__version__}\n"


@pytest.mark.parametrize("module", ["onnxcomp", "onnxcomp.cli"])
def test_import_loads_no_framework(module):
    code = f"import {module}, sys; print(*{{'torch', 'tvm', 'onnxruntime', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_import_is_quick():
    code = "import sys; before = set(sys.modules); import onnxcomp; print(len(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, "it loads next to nothing; a number is steadier than a time"


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
def test_progress_goes_to_a_terminal_only(tmp_path, model_path, data_path, recipe_path):
    import pty

    arguments = ["rewrite", model_path, "-o", tmp_path / "m.onnx", "--data", data_path, "--recipe", recipe_path]
    command = [sys.executable, "-m", "onnxcomp", *map(str, arguments), "--json"]
    environment = {**os.environ, "TERM": "xterm", "FORCE_COLOR": "1"}
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert piped.stderr == ""
    master, slave = pty.openpty()
    try:
        shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, check=True, env=environment)
        text = os.read(master, 1 << 16).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert json.loads(shown.stdout)["path"] == json.loads(piped.stdout)["path"]
    assert "\x1b[" in text


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves(options):
    command = [sys.executable, "-m", "onnxcomp", "list", "passes", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) in (0, 1)
