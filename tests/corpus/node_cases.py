"""The node tests of the onnx package and its exported PyTorch layers, as models with feeds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
from onnx import numpy_helper

FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class Case:
    """A model and one feed.

    Attributes:
        name: What the onnx package calls it.
        model: The model.
        feed: Input name to array, list (a sequence) or None (an optional without a value).
        rtol: Tolerance that the onnx package states for it.
    """

    name: str
    model: onnx.ModelProto
    feed: dict[str, Any]
    rtol: float


def node_cases() -> list[Case]:
    """All cases; those of single ops are computed by the onnx package on the spot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, on the casts that the package computes
        from onnx.backend.test.case.node import collect_testcases

        found = [
            Case(t.name, t.model, _named(t.model, t.data_sets[0][0]), t.rtol)
            for t in collect_testcases(None)
            if t.model is not None and t.data_sets
        ]
    folder = Path(onnx.backend.test.__file__).parent / "data"
    return found + [case for name in FOLDERS for case in _from_folder(folder / name)]


def with_weights(case: Case, keep: int) -> Case | None:
    """The case with all inputs behind the first `keep` made initializers; None if that changes nothing or cannot be."""
    graph = onnx.GraphProto()
    graph.CopyFrom(case.model.graph)
    moved = [i.name for i in graph.input[keep:]]
    arrays = [case.feed.get(name) for name in moved]
    if not moved or any(not isinstance(a, np.ndarray) for a in arrays):
        return None
    types = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    del graph.input[keep:]
    for name, array in zip(moved, arrays, strict=True):
        tensor = numpy_helper.from_array(array, name)
        if tensor.data_type != types[name]:
            return None
        graph.initializer.append(tensor)
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.graph.CopyFrom(graph)
    feed = {k: v for k, v in case.feed.items() if k not in moved}
    return Case(f"{case.name}, {keep} inputs", model, feed, case.rtol)


def _named(model: onnx.ModelProto, values: Any) -> dict[str, Any]:
    weights = {t.name for t in model.graph.initializer}
    names = [i.name for i in model.graph.input if i.name not in weights or len(values) == len(model.graph.input)]
    return {name: _plain(value) for name, value in zip(names, values, strict=False)}


def _plain(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return numpy_helper.to_list(value)
    if isinstance(value, onnx.OptionalProto):
        return numpy_helper.to_optional(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _from_folder(folder: Path) -> Iterator[Case]:
    for case in sorted(folder.iterdir()) if folder.is_dir() else ():
        model = onnx.load(case / "model.onnx")
        data = case / "test_data_set_0"
        values = []
        for index in range(len(list(data.glob("input_*.pb")))):
            tensor = onnx.TensorProto()
            try:
                tensor.ParseFromString((data / f"input_{index}.pb").read_bytes())
                values.append(numpy_helper.to_array(tensor))
            except Exception:  # a sequence, which a name cannot tell
                break
        else:
            yield Case(case.name, model, _named(model, values), 1e-3)
