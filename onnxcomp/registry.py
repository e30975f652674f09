"""Finds passes, targets and devices through entry points; built-in ones are registered as a third party's would be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from onnxcomp.device import Device
from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.rewrite import Pass
from onnxcomp.target import Target

PASSES = "onnxcomp.passes"
TARGETS = "onnxcomp.targets"
DEVICES = "onnxcomp.devices"


def names(group: str) -> list[str]:
    """Names registered in an entry point group, sorted."""
    return sorted(_entries(group))


def load_pass(name: str) -> type[Pass]:
    """The pass class registered as `name`.

    Raises:
        RecipeError: If there is none, it is registered twice, or it is not a `Pass`.
    """
    return _load(PASSES, name, "pass", Pass)


def load_target(name: str) -> type[Target]:
    """The target class registered as `name`.

    Raises:
        RecipeError: If there is none, it is registered twice, or it is not a `Target`.
    """
    return _load(TARGETS, name, "target", Target)


def load_device(kind: str) -> type[Device]:
    """The device class registered as `kind`.

    Raises:
        RecipeError: If there is none, it is registered twice, or it is not a `Device`.
    """
    return _load(DEVICES, kind, "kind of device", Device)


def _load(group: str, name: str, what: str, base: type) -> type:
    entries = _entries(group)
    if name not in entries:
        raise RecipeError(unknown(what, name, sorted(entries)))
    entry = entries[name]
    try:
        found = entry.load()
    except OnnxcompError:
        raise
    except Exception as error:
        raise RecipeError(f"{what} {name!r} ({entry.value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise RecipeError(f"{what} {name!r} ({entry.value}) is not a {base.__name__}")
    return found


def _entries(group: str) -> Mapping[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise RecipeError(
                f"{entry.name!r} is registered twice in {group}: by {other.value} and by {entry.value}; uninstall one"
            )
    return found


def unknown(what: str, name: str, known: list[str]) -> str:
    """Message for an unknown name, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}{hint} There are: {', '.join(known) or 'none'}"
