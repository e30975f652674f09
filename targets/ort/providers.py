"""Execution providers of onnxruntime: what runs a model, in the order in which nodes are offered to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"

_GPU_BUILD = (
    "install the GPU build in place of the plain one: pip uninstall -y onnxruntime && pip install --force-reinstall "
    "--no-deps onnxruntime-gpu"
)
INSTALL: Mapping[str, str] = {
    CPU: "pip install onnxruntime",
    CUDA: _GPU_BUILD,
    TENSORRT: f"{_GPU_BUILD}; its libraries come with: pip install tensorrt",
}
"""Provider to how one gets it."""


class Provider(BaseModel):
    """A provider as the manifest names it.

    Options are those that this package writes and no others: some that TensorRT knows name libraries to load, which a
    manifest from elsewhere must not choose. Their values are what onnxruntime takes for a boolean; it refuses 0 and 1.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]
    options: dict[Literal["trt_sparsity_enable", "trt_fp16_enable", "trt_int8_enable"], Literal["True", "False"]] = (
        Field(default_factory=dict)
    )


CPU_ONLY = (Provider(name=CPU),)
