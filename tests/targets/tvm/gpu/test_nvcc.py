"""Every kernel for GPUs as machine code: nvcc takes it for two architectures, and keeps its values in registers."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

tvm = pytest.importorskip("tvm")

from onnxcomp.errors import CompileError  # noqa: E402
from onnxcomp.targets.tvm.gpu import nvcc  # noqa: E402
from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("test_*.py") if "def cases(" in path.read_text(encoding="utf-8"))
MODULES.remove("test_nvcc")
ARCHITECTURES = {"sm_87": "jetson-orin", "sm_90": "h100"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_kernels_become_machine_code_without_spilled_registers(module, arch, tmp_path):
    try:
        compiler = nvcc.nvcc()
    except CompileError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location(module, HERE / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    functions = {}
    for index, (_, function) in enumerate(tests.cases()):
        functions[f"k{index}"] = function.with_attr("global_symbol", f"k{index}")
    assert functions
    built = tvm.compile(tvm.IRModule(functions), target=gpu(ARCHITECTURES[arch], frozenset()).target())
    source = tmp_path / "kernels.cu"
    source.write_text(built.mod.imports[0].inspect_source(), encoding="utf-8")
    done = subprocess.run(
        [compiler, "-cubin", "-O3", "-std=c++17", "-w", "-Xptxas=-v", f"-arch={arch}", "-o", tmp_path / "out", source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", done.stderr, re.DOTALL)
    assert len(kernels) >= len(functions)
    assert {name: stores for name, stores in kernels if int(stores)} == {}
