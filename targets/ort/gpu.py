"""ONNX Runtime on a GPU, by CUDA or TensorRT.

A model is compiled where no such GPU is at hand, too: then it is checked on the CPU, and nothing is said about what
runs where. These targets have not been timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import override

from onnxcomp.manifest import model_hash
from onnxcomp.model import all_nodes, initializers
from onnxcomp.rewrite import Pass
from onnxcomp.target import Artifact, Capabilities, Feed, NodeTime, Session, Target
from onnxcomp.targets.ort.capabilities import max_opset
from onnxcomp.targets.ort.compile import compile_model, open_artifact
from onnxcomp.targets.ort.delta_lowering import NativeDelta
from onnxcomp.targets.ort.manifest import MODEL, providers_of
from onnxcomp.targets.ort.plain_nm import PlainNm
from onnxcomp.targets.ort.profiling import peak_memory, states
from onnxcomp.targets.ort.providers import CPU, CUDA, TENSORRT, Provider
from onnxcomp.targets.ort.runtime import make_session, require, session_options
from onnxcomp.targets.ort.session import OrtSession
from onnxcomp.targets.ort.sparse_weights import has_sparse_weight

__all__ = ["OrtCuda", "OrtTensorrt"]


class _OrtGpu(Target):
    """What both have in common."""

    chain: ClassVar[tuple[str, ...]]
    """Providers, in the order in which they are offered nodes."""

    def providers(self, model: ir.Model) -> tuple[Provider, ...]:
        """Providers for a model, with their options."""
        return tuple(Provider.model_validate({"name": name}) for name in self.chain)

    @override
    def capabilities(self) -> Capabilities:
        # No placement of Q/DQ pairs was checked on a GPU, so there is none that `quantize` may go by.
        return Capabilities(
            target=self.name,
            max_opset=max_opset(),
            activation_dtypes=(ir.DataType.INT8,),
            weight_dtypes=(ir.DataType.INT8,),
            placements={},
        )

    @override
    def lowering(self) -> Sequence[Pass]:
        return (PlainNm(), NativeDelta(kernels=False))

    @override
    def require_device(self) -> None:
        require([Provider.model_validate({"name": name}) for name in self.chain])

    @override
    def compile(self, model: ir.Model, out: Path) -> Artifact:
        return compile_model(model, Path(out), self.capabilities(), self.providers)

    @override
    def open(self, path: Path) -> Artifact:
        return open_artifact(Path(path), self.name)

    @override
    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Loads an artifact; `threads` serve what is left to the CPU.

        Raises:
            DeviceError: If a provider is missing or cannot be loaded.
        """
        options = session_options(threads=threads, domains=artifact.manifest["opsets"])
        inner = make_session(artifact.path / MODEL, options, providers_of(artifact))
        return OrtSession(inner, states(artifact), model_hash=model_hash(artifact))

    @override
    def node_times(self, artifact: Artifact, feed: Feed, *, threads: int = 1, repeat: int = 10) -> Sequence[NodeTime]:
        """Nothing: onnxruntime's profiler sees how long it takes to start work on a GPU, not how long the work takes.

        Raises:
            DeviceError: If a provider is missing.
        """
        require(providers_of(artifact))
        return ()

    @override
    def peak_memory(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> int:
        """Peak resident memory of the host's process; that of the GPU is not in it."""
        require(providers_of(artifact))
        return peak_memory(artifact, feed, threads=threads)


class OrtCuda(_OrtGpu):
    """Compiles for onnxruntime's CUDA provider, which multiplies zeros as any other weight."""

    name: ClassVar[str] = "ort-cuda"
    summary: ClassVar[str] = "ONNX Runtime on a GPU by CUDA; not timed"
    chain: ClassVar[tuple[str, ...]] = (CUDA, CPU)


class OrtTensorrt(_OrtGpu):
    """Compiles for onnxruntime's TensorRT provider, which may use sparse tensor cores for 2:4 weights."""

    name: ClassVar[str] = "ort-tensorrt"
    summary: ClassVar[str] = "ONNX Runtime on a GPU by TensorRT, with its sparsity option for 2:4 weights; not timed"
    chain: ClassVar[tuple[str, ...]] = (TENSORRT, CUDA, CPU)

    @override
    def providers(self, model: ir.Model) -> tuple[Provider, ...]:
        weights = [value.const_value for value in initializers(model)]
        halves = any(tensor is not None and tensor.dtype == ir.DataType.FLOAT16 for tensor in weights)
        integers = any(node.op_type in ("DequantizeLinear", "QuantizeLinear") for node in all_nodes(model))
        options = {
            "trt_sparsity_enable": str(has_sparse_weight(model)),
            "trt_fp16_enable": str(halves),
            "trt_int8_enable": str(integers),
        }
        first, *others = super().providers(model)
        return (Provider.model_validate({"name": first.name, "options": options}), *others)
