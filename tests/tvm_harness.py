"""Runs kernels and whole models by TVM on this machine, for CPUs that it can stand in for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax

from onnxcomp.model import infer_shapes
from onnxcomp.rewrite import Context, Pass
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.tvm.importing import to_relax
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.pipeline import build

X86 = "x86_64-linux-gnu"
AVX512 = Machine(
    name="avx512", triple=X86, cpu="cascadelake", features=("-prefer-256-bit",), lanes=16, registers=32, dot="vnni512"
)
AVX2 = Machine(name="avx2", triple=X86, cpu="haswell", lanes=8, registers=16, dot="avx2")
SSE2 = Machine(name="sse2", triple=X86, cpu="x86-64", lanes=4, registers=16, dot="none")
# What is compiled for NEON, where products take one lane of a vector, on any CPU.
BY_LANE = Machine(name="by lane", triple=X86, cpu="x86-64", lanes=4, registers=32, dot="none")


def _flags() -> set[str]:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


def machines() -> list[Machine]:
    """Those whose code this CPU can run."""
    flags = _flags()
    found = [SSE2]
    if {"avx2", "fma"} <= flags:
        found.append(AVX2)
    if {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"} <= flags:
        found.append(AVX512)
    return found


def tensor(array: np.ndarray) -> Any:
    return tvm.runtime.tensor(np.asarray(array, order="C"))


def compiled(function: Any, machine: Machine) -> Any:
    """A kernel as a function of TVM tensors, the output last."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=machine.target())["main"]


def run_kernel(
    function: Any, machine: Machine, *inputs: np.ndarray, shape: Sequence[int], dtype: str = "float32"
) -> np.ndarray:
    """What a kernel fills its output with."""
    out = tensor(np.full(tuple(shape), 77, dtype))
    compiled(function, machine)(*map(tensor, inputs), out)
    return np.asarray(out.numpy())


def lowered(model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
    """A copy that passes were applied to."""
    working = model.clone()
    infer_shapes(working)
    context = Context(capabilities=OrtCpu().capabilities())
    for one in passes:
        one.apply(working, context)
    return working


class Compiled:
    """A model by TVM: lowered by `passes`, compiled, ready to run."""

    def __init__(self, model: ir.Model, passes: Sequence[Pass], machine: Machine) -> None:
        working = lowered(model, passes)
        self.names = [str(v.name) for v in working.graph.inputs]
        imported = to_relax(working, machine)
        self._weights = [tensor(w.numpy()) for w in imported.weights.values()]
        self._machine = relax.VirtualMachine(build(imported.module, machine), tvm.cpu())

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.fetch(self.bind(feed))

    def bind(self, feed: Mapping[str, np.ndarray]) -> list[Any]:
        """Arguments for `call`, so that a timing has no copies in it."""
        return [tensor(feed[name]) for name in self.names if name in feed] + self._weights

    def call(self, arguments: Sequence[Any]) -> Any:
        return self._machine["main"](*arguments)

    def fetch(self, arguments: Sequence[Any]) -> list[np.ndarray]:
        out = self.call(arguments)
        return [o.numpy() for o in ([out] if hasattr(out, "numpy") else out)]
