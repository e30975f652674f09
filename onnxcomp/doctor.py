"""Says what is installed, what this machine offers, and what to do about what is missing."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata

from onnxcomp import native
from onnxcomp.errors import CompileError


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: `ok`, `missing` (optional) or `broken`.
        value: What was found.
        fix: Command or advice that mends it; empty if nothing has to be.
    """

    name: str
    state: str
    value: str
    fix: str = ""


_CORE = ("onnxcomp", "numpy", "onnx", "onnx-ir", "onnxscript", "pydantic", "typer", "rich", "jinja2")
_OPTIONAL = {
    "torch": "pip install 'onnxcomp[export]'",
    "matplotlib": "pip install 'onnxcomp[plot]'",
    "apache-tvm": "pip install 'onnxcomp[tvm]'",
}

_FFI, _FFI_SERIES = "apache-tvm-ffi", "0.1.14."


def environment() -> dict[str, str]:
    """Versions and machine, for reports."""
    names = ("onnxcomp", "onnx", "onnx-ir", "onnxscript", "numpy", *_runtimes())
    found = {name: version for name in names if (version := _version(name))}
    return {"python": platform.python_version(), "system": platform.platform(), "cpu": _cpu(), **found}


def diagnose() -> list[Diagnosis]:
    """Looks at everything."""
    checks = [Diagnosis(name="python", state="ok", value=platform.python_version())]
    checks += [_core(name) for name in _CORE]
    checks.append(_runtime())
    checks += _machine()
    for name, fix in _OPTIONAL.items():
        version = _version(name)
        checks.append(
            Diagnosis(name=name, state="ok" if version else "missing", value=version, fix="" if version else fix)
        )
    checks += _tvm_ffi()
    checks += _nvcc()
    compiler = next((path for c in ("c++", "g++", "clang++") if (path := shutil.which(c))), "")
    checks.append(
        Diagnosis(
            name="C++ compiler",
            state="ok" if compiler else "missing",
            value=compiler,
            fix="" if compiler else "install g++ or clang++ (Debian: apt-get install g++)",
        )
    )
    library = native.library_path()
    checks.append(
        Diagnosis(
            name="native kernels",
            state="ok" if library else "missing",
            value="built" if library else "",
            fix="" if library else "pip install --force-reinstall --no-deps onnxcomp, with a C++ compiler at hand",
        )
    )
    return checks


def _core(name: str) -> Diagnosis:
    version = _version(name)
    fix = "" if version else f"pip install {name}"
    return Diagnosis(name=name, state="ok" if version else "broken", value=version, fix=fix)


def _runtime() -> Diagnosis:
    found = _runtimes()
    value = ", ".join(f"{name} {_version(name)}" for name in found)
    if len(found) > 1:
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want: they overwrite each other"
        return Diagnosis(name="ONNX Runtime", state="broken", value=value, fix=fix)
    fix = "" if found else "pip install onnxruntime"
    return Diagnosis(name="ONNX Runtime", state="ok" if found else "broken", value=value, fix=fix)


def _tvm_ffi() -> list[Diagnosis]:
    """Whether TVM's other half is of the version that it works with; pip chooses a newer one by itself."""
    version = _version(_FFI)
    if not _version("apache-tvm"):
        return []
    good = version.startswith(_FFI_SERIES)
    fix = "" if good else f"pip install '{_FFI}=={_FFI_SERIES}*': TVM crashes with newer ones"
    return [Diagnosis(name=_FFI, state="ok" if good else "broken", value=version, fix=fix)]


def _nvcc() -> list[Diagnosis]:
    """Whether kernels can be compiled for NVIDIA GPUs, which takes no GPU."""
    from onnxcomp.targets.tvm.gpu.nvcc import nvcc

    if not _version("apache-tvm"):
        return []
    try:
        return [Diagnosis(name="tvm-cuda", state="ok", value=f"compiles by {nvcc()}")]
    except CompileError:
        fix = "pip install 'onnxcomp[tvm-cuda]'"
        return [Diagnosis(name="tvm-cuda", state="missing", value="no CUDA compiler", fix=fix)]


def _machine() -> list[Diagnosis]:
    checks = [Diagnosis(name="CPU", state="ok", value=_cpu())]
    try:
        from onnxcomp.targets.ort.capabilities import capabilities
        from onnxcomp.targets.ort.providers import CUDA, INSTALL, TENSORRT
        from onnxcomp.targets.ort.runtime import onnxruntime

        providers = onnxruntime().get_available_providers()
        found = capabilities("ort-cpu")
    except Exception as error:  # a package of which half was removed may raise anything
        fix = "pip install --force-reinstall --no-deps onnxruntime"
        value = f"onnxruntime does not work: {error}"
        return [*checks, Diagnosis(name="execution providers", state="broken", value=value, fix=fix)]
    checks.append(Diagnosis(name="execution providers", state="ok", value=", ".join(providers)))
    dot = "8-bit dot product" if not found.reduce_range else "no 8-bit dot product: weights are quantized to 7 bits"
    checks.append(Diagnosis(name="CPU features", state="ok", value=", ".join(found.features) + f" ({dot})"))
    checks.append(Diagnosis(name="highest opset", state="ok", value=str(found.max_opset)))
    for target, provider in (("ort-cuda", CUDA), ("ort-tensorrt", TENSORRT)):
        built = provider in providers
        value = "onnxruntime has the provider" if built else "compiles, cannot run here"
        fix = "" if built else INSTALL[provider]
        checks.append(Diagnosis(name=target, state="ok" if built else "missing", value=value, fix=fix))
    return checks


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in {"model name", "Hardware"} and value.strip():
                    return value.strip()
        return platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _runtimes() -> list[str]:
    return [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
