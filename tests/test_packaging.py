"""What is in the wheel, and what `import onnxcomp` costs."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _build(out: Path, kind: str, **environment: str) -> Path:
    """Builds with the tools of this environment, so that the test needs no network, and leaves the checkout alone."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            kind,
            "--no-isolation",
            "--skip-dependency-check",
            "--outdir",
            str(out),
            str(ROOT),
        ],
        env={k: v for k, v in os.environ.items() if k != "ONNXCOMP_NO_NATIVE"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    pytest.importorskip("build")
    pytest.importorskip("scikit_build_core")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not run from a checkout")


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("pure"), "--wheel", ONNXCOMP_NO_NATIVE="1")


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None or not (shutil.which("ninja") or shutil.which("make")):
        pytest.skip("cmake and ninja or make are not on PATH")
    if not any(shutil.which(c) for c in ("c++", "g++", "clang++", os.environ.get("CXX", "c++"))):
        pytest.skip("there is no C++ compiler")
    return _build(tmp_path_factory.mktemp("native"), "--wheel")


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _assert_complete(names: list[str]) -> None:
    assert len(names) == len(set(names))
    info = {n.split("/")[0] for n in names} - {"onnxcomp"}
    assert len(info) == 1
    assert info.pop().endswith(".dist-info")
    assert {"onnxcomp/__init__.py", "onnxcomp/passes/__init__.py", "onnxcomp/targets/__init__.py"} <= set(names)
    assert "onnxcomp/py.typed" in names
    for folder in ("recipes", "templates"):
        for path in (ROOT / "onnxcomp" / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in names
    unwanted = (".cpp", ".h", ".map", ".pyc", "CMakeLists.txt")
    runner = "onnxcomp/targets/tvm/runner/"
    assert not [n for n in names if n.endswith(unwanted) and not n.startswith(runner)]
    sources = [p for p in (ROOT / "targets/tvm/runner").iterdir() if p.is_file()]
    assert {runner + p.name for p in sources} <= set(names)
    assert {f"onnxcomp/targets/tvm/boards/{p.name}" for p in (ROOT / "targets/tvm/boards").glob("*.toml")} <= set(names)


def test_pure_wheel(pure_wheel: Path) -> None:
    names = _names(pure_wheel)
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    _assert_complete(names)
    assert "onnxcomp/native/__init__.py" in names
    assert not [n for n in names if n.endswith((".so", ".dylib", ".dll"))]


def test_native_wheel(native_wheel: Path, pure_wheel: Path) -> None:
    names = _names(native_wheel)
    _assert_complete(names)
    # The library has no Python ABI: one wheel a platform.
    assert "-py3-none-" in native_wheel.name
    assert "-any" not in native_wheel.name
    libraries = [n for n in names if n.endswith((".so", ".dylib", ".dll"))]
    assert len(libraries) == 1
    assert libraries[0].startswith("onnxcomp/native/onnxcomp_native.")
    assert {n for n in names if n.startswith("onnxcomp/")} - set(libraries) == {
        n for n in _names(pure_wheel) if n.startswith("onnxcomp/")
    }


def test_entry_points_are_in_the_wheel(pure_wheel: Path) -> None:
    names = set(_names(pure_wheel))
    with zipfile.ZipFile(pure_wheel) as archive:
        (path,) = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(path).decode())
    values = [value for section in parser.sections() for value in parser[section].values()]
    assert values
    for value in values:
        module = value.partition(":")[0].replace(".", "/")
        assert {f"{module}.py", f"{module}/__init__.py"} & names, value


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="there is no README.md")
def test_readme_is_the_description(pure_wheel: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as archive:
        (path,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = archive.read(path).decode()
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata, "set `readme` in pyproject.toml"


def test_sdist_builds_without_the_links_of_an_editable_install(tmp_path: Path) -> None:
    with tarfile.open(_build(tmp_path, "--sdist")) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "passes/__init__.py", "targets/__init__.py"} <= names
    assert {"onnxcomp/native/CMakeLists.txt", "onnxcomp/native/ort_ops.cpp", "onnxcomp/native/ops.map"} <= names
    assert not [n for n in names if n.startswith(("onnxcomp/passes", "onnxcomp/targets", ".venv"))]


@pytest.mark.parametrize("module", ["onnxcomp", "onnxcomp.native", "onnxcomp.ops"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    """Each of these costs seconds, so only the code that needs one imports it."""
    code = f"import {module}, sys; print(*sorted({{'torch', 'tvm', 'onnxruntime', 'onnxscript'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
