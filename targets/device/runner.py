"""The runner of TVM artifacts for a device's architecture."""

from __future__ import annotations

import importlib
from pathlib import Path

from onnxcomp.errors import DeviceError, OnnxcompError

RUNNER = "onnxcomp-run"
_BUILDER = "onnxcomp.targets.tvm.runner_build"


def deploy_runner(triple: str, folder: Path, *, gpu: bool) -> None:
    """Puts the runner for `triple` and its libraries into `folder`, with what a GPU needs if `gpu`.

    Raises:
        DeviceError: If there is none and none can be built.
    """
    try:
        importlib.import_module(_BUILDER).deploy(triple, folder, gpu=gpu)
    except ImportError as error:
        raise DeviceError(
            f"there is no runner for {triple}: {error}; install what builds it with: pip install 'onnxcomp[tvm]'"
        ) from error
    except OnnxcompError as error:
        raise DeviceError(f"there is no runner for {triple}: {error}") from error
    except OSError as error:
        raise DeviceError(f"the runner for {triple} cannot be put into {folder}: {error}") from error
    if not (folder / RUNNER).is_file():
        raise DeviceError(f"the runner for {triple} was not built: {folder} has no {RUNNER}")
