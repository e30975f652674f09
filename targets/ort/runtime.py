"""The one place that imports onnxruntime and makes its sessions, so that all sessions are made alike."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onnxcomp import native
from onnxcomp.errors import CompileError, DeviceError, UnsupportedError
from onnxcomp.targets.ort.providers import CPU, CPU_ONLY, INSTALL, Provider

_OF_A_DEVICE = re.compile(r"CUDA failure|CUDA error|CUDNN|cudaError|TensorRT|lib(cu|nvinfer)\S*\.so")


def onnxruntime() -> Any:
    """The onnxruntime module, imported on first use since that takes long.

    Its telemetry, on by default, is off unless the environment says otherwise: it leaves a file in the temporary folder
    and sends events.

    Raises:
        UnsupportedError: If it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, while it is imported; the API comes too late
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UnsupportedError(
            f"onnxruntime cannot be imported ({error}); install it with: pip install onnxruntime"
        ) from error


def session_options(*, threads: int, domains: Iterable[str] = (), optimize: bool = True) -> Any:
    """Fresh options; the native library is registered here and nowhere else, since twice on one object is an error.

    Args:
        threads: Threads of one run; 0 lets onnxruntime choose.
        domains: Op domains that the model uses.
        optimize: Whether graphs are optimised.

    Raises:
        UnsupportedError: If the model needs the native library and there is none.
    """
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # A spinning pool burns the CPU time of whoever shares the machine, and slows the model on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if native.DOMAIN in set(domains):
        library = native.library_path()
        if library is None:
            raise UnsupportedError(
                f"the model uses ops of domain {native.DOMAIN}, but onnxcomp was installed without its native library; "
                "reinstall it with a C++ compiler at hand, or rewrite the model without native ops"
            )
        options.register_custom_ops_library(str(library))
    return options


def missing_provider(providers: Sequence[Provider]) -> str:
    """The first of some providers that the installed onnxruntime was built without; empty if it has all."""
    built = set(onnxruntime().get_available_providers())
    return next((provider.name for provider in providers if provider.name not in built), "")


def require(providers: Sequence[Provider]) -> None:
    """Fails if the installed onnxruntime was built without one of the providers.

    Raises:
        DeviceError: The message tells what to install.
    """
    if missing := missing_provider(providers):
        raise DeviceError(f"this onnxruntime has no {missing}; {INSTALL[missing]}")


def make_session(model: str | Path | bytes, options: Any, providers: Sequence[Provider] = CPU_ONLY) -> Any:
    """An InferenceSession, on the CPU by default.

    Raises:
        UnsupportedError: If an op has no kernel; the message names the node.
        DeviceError: If a provider is missing, or onnxruntime would do without it.
        CompileError: If onnxruntime rejects the model for another reason.
    """
    require(providers)
    source = model if isinstance(model, bytes) else str(model)
    try:
        # Left to itself it says on stdout that a provider failed, and goes on with others.
        session = onnxruntime().InferenceSession(
            source,
            options,
            providers=[provider.name for provider in providers],
            provider_options=[dict(provider.options) for provider in providers],
            enable_fallback=0,
        )
    except Exception as error:  # its exceptions have no common root below Exception
        message = clean(error)
        if providers[0].name != CPU and _OF_A_DEVICE.search(message):
            raise DeviceError(f"onnxruntime cannot use {providers[0].name}: {message}") from error
        missing = re.search(r"implementation for (\S+) node with name '([^']*)'", message)
        if missing:
            raise UnsupportedError(
                f"onnxruntime has no CPU kernel for node {missing[2]!r}, op {missing[1]}; lower the model's opset, or "
                "express the op by others"
            ) from error
        raise CompileError(f"onnxruntime rejects the model: {message}") from error
    used = session.get_providers()
    if left_out := next((provider.name for provider in providers if provider.name not in used), ""):
        raise DeviceError(
            f"onnxruntime could not load {left_out} and would run on {', '.join(used)}; look whether the GPU, its "
            "driver and the libraries that onnxruntime-gpu needs (CUDA, cuDNN; TensorRT for its provider) are there"
        )
    return session


def clean(error: BaseException) -> str:
    """The message of an onnxruntime exception without its C++ source position."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S*onnxruntime\S*:\d+ \S.*?\) ?(?:const )?(?=[A-Z])", "", text)
    return text[:500]
