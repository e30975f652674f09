"""What `doctor` says of TVM, whose two packages have to fit each other, and of the compiler for GPUs."""

from __future__ import annotations

import pytest

from onnxcomp import doctor
from onnxcomp.errors import CompileError
from onnxcomp.targets.tvm.gpu import nvcc


@pytest.mark.parametrize(
    ("versions", "states"),
    [
        ({"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}, ["ok"]),
        ({"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}, ["broken"]),
        ({"apache-tvm": "0.27.0.post1"}, ["broken"]),
        ({}, []),
    ],
)
def test_tvm_needs_the_right_version_of_its_other_half(monkeypatch, versions, states):
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, ""))
    found = doctor._tvm_ffi()
    assert [d.state for d in found] == states
    assert all(d.fix.startswith("pip install 'apache-tvm-ffi==0.1.14.") for d in found if d.state == "broken")


def test_the_compiler_for_gpus_is_named_or_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_version", lambda name: "0.27.0.post1")
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    (found,) = doctor._nvcc()
    assert (found.state, found.value) == ("ok", f"compiles by {home / 'bin' / 'nvcc'}")

    def missing():
        raise CompileError("none")

    monkeypatch.setattr(nvcc, "nvcc", missing)
    (found,) = doctor._nvcc()
    assert (found.state, found.fix) == ("missing", "pip install 'onnxcomp[tvm-cuda]'")
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    assert doctor._nvcc() == []
