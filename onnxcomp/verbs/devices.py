"""Verbs for devices: which there are, what they are, and what runs on them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.data import Source, load_data
from onnxcomp.device import Device, DeviceFacts, DeviceProfile, DeviceSpec
from onnxcomp.registry import DEVICES, load_device, names
from onnxcomp.target import Array, Feed
from onnxcomp.targets.device import store
from onnxcomp.targets.device.artifacts import DeviceArtifact
from onnxcomp.verbs.resolve import ModelLike, Shapes, compiled, load_model, make_target


def add_device(name: str, kind: str, **settings: str | int) -> DeviceSpec:
    """Keeps a device for later; it is not reached.

    Args:
        name: What it is to be called: letters, digits, - and _.
        kind: One of `list_device_kinds`.
        **settings: Of that kind; see `onnxcomp devices add --help`.

    Raises:
        DeviceError: If there is one of this name, or a setting is not valid.
        RecipeError: If there is no such kind.
    """
    spec = DeviceSpec(name=name, kind=kind, settings=settings)
    store.add(spec)
    return spec


def list_devices() -> dict[str, DeviceSpec]:
    """Devices by name; `local` is always there."""
    return store.read()


def list_device_kinds() -> dict[str, str]:
    """Kind of device to its summary."""
    return {kind: load_device(kind).summary for kind in names(DEVICES)}


def remove_device(name: str) -> None:
    """Forgets a device.

    Raises:
        DeviceError: If there is none of this name.
    """
    store.remove(name)


def check_device(device: str | Device) -> DeviceFacts:
    """Reaches a device and asks what it is.

    Raises:
        DeviceError: If it is not known, or cannot be reached.
    """
    return _device(device).check()


def run_on(device: str | Device, artifact: str | os.PathLike[str], feeds: Sequence[Feed]) -> list[dict[str, Array]]:
    """Runs an artifact on a device, one feed after another; streaming state is carried from one to the next.

    Args:
        device: Its name.
        artifact: Folder of the artifact.
        feeds: Input name to array.

    Returns:
        Output name to array, one mapping a feed.

    Raises:
        DataError: If a feed does not fit.
        DeviceError: If the device is not known, cannot be reached, or fails.
    """
    return _device(device).run(Path(artifact), list(feeds))


def profile_on(
    device: str | Device,
    model: ModelLike,
    *,
    target: str | None = None,
    data: Source = "random",
    threads: int = 1,
    repeat: int = 50,
    seconds: float | None = 60.0,
    seed: int = 0,
    shapes: Shapes | None = None,
) -> DeviceProfile:
    """Measures an artifact on a device.

    Args:
        device: Its name.
        model: Folder of an artifact; a model or an `.onnx` file is compiled for `target` first.
        target: Name of the target, by default `ort-cpu`; an artifact has its own.
        data: The first feed is run.
        threads: Threads a run.
        repeat: Most runs.
        seconds: Most seconds to spend on timing.
        seed: For random data.
        shapes: Fixes dynamic input shapes.

    Raises:
        DeviceError: If the device is not known, cannot be reached, or fails.
    """
    found = _device(device)
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        if isinstance(model, ir.Model) or not Path(model).is_dir():
            path = compiled(load_model(model, shapes), make_target(target or "ort-cpu"), Path(folder, "model")).path
        else:
            path = Path(model)
        feed = next(iter(load_data(data, DeviceArtifact(path).inputs, seed=seed)))
        return found.profile(path, feed, threads=threads, repeat=repeat, seconds=seconds)


def _device(device: str | Device) -> Device:
    return device if isinstance(device, Device) else store.find(device)
