"""The runner for devices, on this machine: what it computes, and how it takes files that are not as they should be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from builder import Builder  # noqa: E402
from device import artifacts  # noqa: E402
from onnx import helper  # noqa: E402

from onnxcomp.errors import CompileError  # noqa: E402
from onnxcomp.targets.tvm import TvmAarch64, TvmCpu, linking, runner_build  # noqa: E402

X86 = "x86_64-linux-gnu"
ARM = "aarch64-linux-gnu"
DTYPES = [
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"
]  # fmt: skip

pytestmark = pytest.mark.skipif(not linking.is_host(X86), reason="the artifacts are for x86-64")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The runner in a folder as a device gets it."""
    return runner_build.deploy(X86, tmp_path_factory.mktemp("deployed"))


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return TvmCpu().compile(artifacts.mlp(), tmp_path_factory.mktemp("mlp") / "artifact").path


@pytest.fixture
def changed(mlp, tmp_path):
    """A copy of the artifact that a test may spoil."""
    return Path(shutil.copytree(mlp, tmp_path / "changed"))


@pytest.fixture
def call(program, tmp_path):
    """Runs the runner as on a device: in another folder, with an empty environment."""

    def start(*arguments):
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env={}, cwd=tmp_path)

    return start


def refused(done, code, text):
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr
    assert done.stderr.startswith("onnxcomp-run: ")
    assert done.stderr.count("\n") == 1


def saved(folder, array, name="x"):
    np.save(folder / f"{name}.npy", array)
    return f"{name}={folder / name}.npy"


X = np.ones((3, 20), np.float32)


@pytest.mark.parametrize("make", [artifacts.cnn, artifacts.mlp, artifacts.recurrent])
def test_outputs_are_those_of_the_reference(make, program, tmp_path):
    model = make()
    feeds = artifacts.feeds(model)
    artifact = TvmCpu().compile(model, tmp_path / "artifact").path
    outputs, report = artifacts.run([str(program)], artifact, feeds, tmp_path, "--check")
    expected = artifacts.expected(model, feeds)
    assert outputs.keys() == expected.keys()
    for name, array in outputs.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-4)
    assert report["steps"] == len(feeds)
    assert report["samples"] == len(feeds) - 1


def test_without_steps_arrays_have_no_axis_of_steps(mlp, call, tmp_path):
    done = call(mlp, "--input", saved(tmp_path, X), "--out", "out")
    report = json.loads(done.stdout)
    ((name, file),) = report["outputs"].items()
    expected = artifacts.expected(artifacts.mlp(), [{"x": X}])[name][0]
    np.testing.assert_allclose(np.load(tmp_path / "out" / file), expected, rtol=1e-5, atol=1e-5)
    assert os.listdir(tmp_path / "out") == [file]
    assert report["latency_ms"] is None


def test_what_is_reported(mlp, call):
    done = call(mlp, "--random", "--repeat", 50, "--warmup", 1, "--threads", 2)
    report = json.loads(done.stdout)
    latency = report["latency_ms"]
    assert (report["samples"], report["threads"], report["steps"], report["outputs"]) == (50, 2, 1, {})
    assert 0 < latency["min"] <= latency["p10"] <= latency["median"] <= latency["p90"] <= latency["p99"]
    assert report["load_ms"] > 0
    assert report["first_ms"] > 0
    assert 2**20 < report["peak_rss_bytes"] < 2**26


def test_a_time_limit_ends_the_repetitions(mlp, call):
    started = time.monotonic()
    report = json.loads(call(mlp, "--random", "--repeat", 10**9, "--seconds", 0.2).stdout)
    assert report["samples"] > 1
    assert time.monotonic() - started < 20


def test_check_alone_loads(mlp, call):
    assert json.loads(call(mlp, "--check").stdout)["steps"] == 0


def test_the_fixed_pattern_is_the_same_again_and_differs_between_steps(mlp, call, tmp_path):
    for name in ("a", "b"):
        assert call(mlp, "--random", "--steps", 3, "--out", name).returncode == 0
    (file,) = os.listdir(tmp_path / "a")
    first = np.load(tmp_path / "a" / file)
    np.testing.assert_array_equal(first, np.load(tmp_path / "b" / file))
    assert not np.array_equal(first[0], first[1])


def test_every_element_type_goes_through_files(call, tmp_path):
    b = Builder()
    arrays = {}
    for dtype in DTYPES:
        onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        b.output(b.op("Transpose", b.input(dtype, [2, 3], onnx_type), perm=[1, 0], name=f"t_{dtype}"), onnx_type)
        arrays[dtype] = np.array([[0, 1, 1], [0, 0, 1]], dtype)
    artifact = TvmCpu().compile(b.model(), tmp_path / "artifact").path
    inputs = [part for name, array in arrays.items() for part in ("--input", saved(tmp_path, array, name))]
    done = call(artifact, "--out", "out", *inputs)
    assert done.returncode == 0, done.stderr
    for dtype, array in arrays.items():
        found = np.load(tmp_path / "out" / f"t_{dtype}_out.npy")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array.T)


def test_names_that_no_file_system_takes(call, tmp_path):
    b = Builder()
    x = b.input("a=/b", [2, 2])
    b.output(b.op("Relu", x, name="../up/:0")).output(b.op("Neg", x, name=".._up/:0"))
    artifact = TvmCpu().compile(b.model(), tmp_path / "artifact").path
    done = call(
        artifact, "--out", "out", "--input", saved(tmp_path, np.ones((2, 2), np.float32)).replace("x", "a=/b", 1)
    )
    files = {"../up/:0_out": "_.._up__0_out.npy", ".._up/:0_out": "__.._up__0_out.npy"}
    assert json.loads(done.stdout)["outputs"] == files
    assert sorted(os.listdir(tmp_path / "out")) == sorted(files.values())


def test_a_header_of_version_2(mlp, call, tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, X, version=(2, 0))
    assert call(mlp, "--input", "x=x.npy").returncode == 0


@pytest.mark.parametrize(
    ("array", "options", "text"),
    [
        (X.astype(np.float64), (), "is float64 and not float32"),
        (X.astype(">f4"), (), "'>f4'"),
        (X[:2], (), "has the shape [2,20] and not [3,20]"),
        (X[None], (), "has the shape [1,3,20] and not [3,20]"),
        (np.asfortranarray(X), (), "Fortran order"),
        (X, ("--steps", "2"), "whose first axis is not the 2 of --steps"),
        (np.array([["a"]]), (), "none of little-endian numbers and bool"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(array, options, text, mlp, call, tmp_path):
    refused(call(mlp, "--input", saved(tmp_path, array), *options), 2, text)


def test_a_symbol_has_one_size(call, tmp_path):
    b = Builder()
    b.output(b.op("Add", b.input("x", ["n", 2]), b.input("y", ["n", 2])))
    artifact = TvmCpu().compile(b.model(), tmp_path / "artifact").path
    x, y = (saved(tmp_path, np.zeros((size, 2), np.float32), name) for size, name in ((2, "x"), (3, "y")))
    refused(call(artifact, "--input", x, "--input", y), 2, "input 'y' has the shape [3,2] and not [n,2]")
    refused(call(artifact, "--input", y), 2, "input 'x' is missing")
    assert call(artifact, "--input", y, "--random").returncode == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 something else",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr': '<f4'",
        b"\x93NUMPY\x01\x00\x04\x00{}  ",
        b"\x93NUMPY\x01\x00\x39\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,20)}",
        b"\x93NUMPY\x01\x00\x41\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,20)}".ljust(65),
        b"\x93NUMPY\x01\x00\x50\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999,99999999999)".ljust(80),
    ],
)
def test_a_file_that_is_no_array_is_refused(content, mlp, call, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    refused(call(mlp, "--input", "x=x.npy"), 2, "x.npy")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "no artifact is given"),
        (("nowhere",), "cannot read nowhere/manifest.json"),
        (("a", "b"), "unknown argument 'b'"),
        (("a", "--fast"), "unknown argument '--fast'"),
        (("a", "--steps", "0"), "--steps takes a whole number"),
        (("a", "--steps"), "--steps needs a value"),
        (("a", "--seconds", "nan"), "--seconds takes a positive number"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, text, call):
    refused(call(*arguments), 2, text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "input 'x' is missing"),
        (("--input", "y=y.npy"), "there is no such input"),
        (("--input", "x=none.npy"), "cannot read none.npy"),
        (("--random", "--out", "/proc/no"), "cannot make the folder /proc/no"),
    ],
)
def test_wrong_inputs_and_outputs_are_refused(options, text, mlp, call):
    refused(call(mlp, *options), 2, text)


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set("manifest_version", 2), "version that this runner does not know"),
        (_set("target", "ort-cpu"), "another target"),
        (_set("triple", 1), "'triple' has to be a string"),
        (_set("parameters", ["x", "y"]), "'parameters' are not the inputs and states"),
        (_set("parameters", ["x", "x"]), "listed twice"),
        (_set("returns", []), "is not returned"),
        (_set("inputs", 0, "dtype", "complex64"), "element type 'complex64'"),
        (_set("inputs", {}), "'inputs' has to be a list"),
        (_set("inputs", 0, "shape", [3, -20]), "'shape' has to be a whole number"),
        (_set("weights", 0, "offset", 1), "does not lie in weights.bin"),
        (_set("weights", 0, "offset", 1 << 40), "does not lie in weights.bin"),
        (_set("weights", 0, "offset", -64), "'offset' has to be a whole number"),
        (_set("weights", 0, "offset", True), "'offset' has to be a whole number"),
        (_set("weights", 0, "shape", [1 << 40, 1 << 40]), "too large"),
        (_set("weights", 0, "bytes", 4), "does not lie in weights.bin"),
        (_set("weights", []), "the model failed"),
        (_set("files", "weights.bin", "bytes", 1 << 40), "weights.bin has"),
        (_set("files", {}), "there is no 'model.so'"),
        (_set("outputs", [{"name": "x", "dtype": "float32", "shape": []}]), "is not returned"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change, text, changed, call):
    path = changed / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    refused(call(changed, "--random"), 2, text)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"manifest_version": "1"}', '{"a": "\ud800"}'])
def test_a_manifest_that_is_none_is_refused(content, changed, call):
    (changed / "manifest.json").write_text(content, errors="surrogatepass")
    refused(call(changed, "--random"), 2, "manifest.json")


def test_a_changed_weight_is_found_by_its_hash(changed, call):
    content = bytearray((changed / "weights.bin").read_bytes())
    content[0] ^= 1
    (changed / "weights.bin").write_bytes(content)
    assert call(changed, "--random").returncode == 0
    refused(call(changed, "--random", "--check"), 2, "weights.bin is not the file that was compiled")


def _code(changed, content):
    (changed / "model.so").write_bytes(content)
    path = changed / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["model.so"]["bytes"] = len(content)
    path.write_text(json.dumps(manifest))


def test_code_that_is_none_is_refused(changed, call, tmp_path):
    code = (changed / "model.so").read_bytes()
    _code(changed, b"#!/bin/sh\n")
    refused(call(changed, "--random"), 3, "model.so is no shared object")
    _code(changed, code[:2000])
    refused(call(changed, "--random"), 3, "model")
    linking.call([*linking.compiler(X86), "-shared", "-x", "c", os.devnull, "-o", str(tmp_path / "empty.so")])
    _code(changed, (tmp_path / "empty.so").read_bytes())
    refused(call(changed, "--random"), 3, "it holds no Relax executable")


def test_code_for_another_machine_is_refused(call, tmp_path):
    try:
        linking.compiler(ARM)
    except CompileError as error:
        pytest.skip(str(error))
    artifact = TvmAarch64().compile(artifacts.mlp(), tmp_path / "artifact").path
    refused(call(artifact, "--random"), 3, "the artifact is for aarch64-linux-gnu and not for this machine")


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        (signal.SIGTERM, -signal.SIGTERM, b""),
        (signal.SIGINT, -signal.SIGINT, b""),
        (signal.SIGILL, 3, b"onnxcomp-run: this CPU lacks an instruction that the artifact was compiled for\n"),
        (signal.SIGSEGV, 3, b"onnxcomp-run: the compiled model failed: invalid access to memory\n"),
    ],
)
def test_a_signal_leaves_no_temporary_file(kind, code, text, mlp, program, tmp_path):
    out = tmp_path / "out"
    command = [str(program), str(mlp), "--random", "--steps", "100000000", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        deadline = time.monotonic() + 20
        while not (out.is_dir() and os.listdir(out)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.listdir(out)
        running.send_signal(kind)
        assert running.wait(5) == code
        assert running.stderr.read() == text
    assert os.listdir(out) == []


def test_an_output_that_cannot_be_written_is_told(mlp, call, tmp_path):
    (tmp_path / "out").mkdir()
    (name,) = json.loads((mlp / "manifest.json").read_text())["returns"]
    (tmp_path / "out" / f"{name}.npy").mkdir()
    refused(call(mlp, "--random", "--out", "out"), 2, "cannot write out/")
    assert os.listdir(tmp_path / "out") == [f"{name}.npy"]
