"""The GPU of this machine."""

from __future__ import annotations

from typing import Any

import tvm

from onnxcomp.errors import DeviceError
from onnxcomp.feeds import check_feed
from onnxcomp.target import Artifact, Feed
from onnxcomp.targets.tvm.gpu.machine import capability


def require_gpu(arch: str) -> None:
    """Checks that there is a GPU which runs code for an architecture.

    Raises:
        DeviceError: If there is none.
    """
    if tvm.get_global_func("device_api.cuda", allow_missing=True) is None:
        raise DeviceError(
            "TVM's runtime for CUDA cannot be loaded: it needs NVIDIA's driver and libcudart.so.13, which "
            "'pip install nvidia-cuda-runtime' brings"
        )
    device = tvm.cuda()
    if not device.exist:
        raise DeviceError(
            "no NVIDIA GPU can be used: there is none, or its driver is too old for CUDA 13; see nvidia-smi"
        )
    major, minor = (int(part) for part in device.compute_version.split("."))
    wanted, only = capability(arch), arch.endswith("a")
    if (major, minor) < wanted or (only and (major, minor) != wanted):
        later = "" if only else " and later"
        raise DeviceError(f"the code is for {arch}{later}; the GPU here, {device.device_name}, is sm_{major}{minor}")


def peak_memory(artifact: Artifact, feed: Feed) -> int:
    """Bytes of the GPU's memory that are taken by loading an artifact and running it.

    What other programs take or give back meanwhile is counted as well.

    Raises:
        DataError: If the feed does not fit.
        DeviceError: If the run fails.
    """
    from onnxcomp.targets.tvm.session import Loaded, TvmSession

    # Blocks that earlier sessions took and gave back would serve this one.
    tvm.get_global_func("vm.builtin.memory_manager.clear")()
    before = _free()
    loaded = Loaded(artifact, 1)
    check_feed(feed, loaded.inputs)
    session = TvmSession(loaded)
    session.run(feed)
    return max(0, before - _free())


def _free() -> int:
    device: Any = tvm.cuda()
    device.sync()
    return int(device.available_global_memory or 0)
