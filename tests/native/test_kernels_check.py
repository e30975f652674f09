"""The kernels without a runtime: under AddressSanitizer and UBSan, and on an emulated aarch64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "onnxcomp" / "native"
SOURCES = ["kernels_check", "kernels_check_pixels"]
FLAGS = ["-std=c++17", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]


def _build(compiler: str, source: str, binary: Path, *flags: str) -> None:
    command = [compiler, *FLAGS, *flags, str(NATIVE / f"{source}.cpp"), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_sanitizers_find_nothing(source, tmp_path):
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    try:
        _build(compiler, source, tmp_path / "check", *sanitize)
    except subprocess.CalledProcessError as error:
        if b"asan" in error.stderr or b"ubsan" in error.stderr:
            pytest.skip("the compiler has no sanitizers")
        raise
    assert " 0 failures" in _run(str(tmp_path / "check"))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("cpu", "sets"), [("cortex-a53", 1), ("max", 2)])
def test_aarch64(source, cpu, sets, tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    _build(compiler, source, tmp_path / "check", "-O2", "-static")
    assert f"{sets} instruction sets" in _run(emulator, "-cpu", cpu, str(tmp_path / "check"))
