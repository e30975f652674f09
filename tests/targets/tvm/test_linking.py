"""Which compiler links for a machine, and how the runner is built and gathered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

tvm = pytest.importorskip("tvm")

from device import artifacts  # noqa: E402

from onnxcomp.errors import CompileError  # noqa: E402
from onnxcomp.targets.tvm import TvmCpu, linking, runner_build  # noqa: E402

X86 = "x86_64-linux-gnu"
ARM = "aarch64-linux-gnu"

pytestmark = pytest.mark.skipif(not linking.is_host(X86), reason="what is expected holds on x86-64")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return runner_build.deploy(X86, tmp_path_factory.mktemp("deployed"))


def test_what_is_deployed_is_small_and_complete(program):
    assert {p.name for p in program.parent.iterdir()} == {runner_build.PROGRAM, *runner_build.LIBRARIES}
    assert sum(p.stat().st_size for p in program.parent.iterdir()) < 10e6


def test_cmake_and_the_toolkit_build_the_same():
    folder = Path(runner_build.__file__).with_name("runner")
    text = (folder / "CMakeLists.txt").read_text()
    assert sorted(text.partition("add_executable(onnxcomp-run ")[2].partition(")")[0].split()) == sorted(
        p.name for p in folder.glob("*.cpp")
    )


def test_a_second_build_is_taken_from_the_cache(program, monkeypatch):
    def call(command):
        assert command[-1] == "--version"
        return linking.call(command)

    monkeypatch.setattr(runner_build, "call", call)
    assert runner_build.runner(X86).read_bytes() == program.read_bytes()


@pytest.mark.parametrize(
    ("triple", "cxx", "there", "chosen"),
    [
        (X86, True, {"g++", "c++"}, ["/bin/g++"]),
        (X86, True, {"clang++"}, ["/bin/clang++"]),
        (X86, False, {"cc"}, ["/bin/cc"]),
        (X86, True, {"cc", "zig"}, ["/bin/zig", "c++", "-target", "x86_64-linux-gnu.2.28"]),
        (ARM, True, {"g++", "aarch64-linux-gnu-g++"}, ["/bin/aarch64-linux-gnu-g++"]),
        (ARM, False, {"aarch64-linux-gnu-gcc"}, ["/bin/aarch64-linux-gnu-gcc"]),
        (ARM, True, {"g++", "zig"}, ["/bin/zig", "c++", "-target", "aarch64-linux-gnu.2.28"]),
        (ARM, True, {"g++"}, None),
        (X86, True, {"cc"}, None),
    ],
)
def test_which_compiler_links(triple, cxx, there, chosen, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    monkeypatch.setattr(linking.importlib.util, "find_spec", lambda _: None)
    linking._zig.cache_clear()
    try:
        if chosen is None:
            with pytest.raises(CompileError, match=f"no compiler links for {triple}.*pip install ziglang"):
                linking.compiler(triple, cxx=cxx)
        else:
            assert linking.compiler(triple, cxx=cxx) == chosen
    finally:
        linking._zig.cache_clear()


def test_a_triple_without_a_runtime_is_refused():
    with pytest.raises(CompileError, match="only x86_64-linux-gnu and aarch64-linux-gnu"):
        linking.compiler("arm-linux-gnueabihf")


def test_a_linker_that_fails_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CompileError, match="false failed"):
        TvmCpu().compile(artifacts.mlp(), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_a_runtime_that_cannot_be_downloaded_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(runner_build.platformdirs, "user_cache_path", lambda _: tmp_path)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CompileError, match=r"cannot download TVM's runtime for aarch64.*PIP_FIND_LINKS"):
        runner_build.libraries(ARM)
    assert list((tmp_path / "tvm").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(runner_build.platformdirs, "user_cache_path", lambda _: tmp_path / "file")
    with pytest.raises(CompileError, match="cannot write to"):
        runner_build.runner(X86)
