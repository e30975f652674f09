"""Tiny models, data for them, and the command line as a function; tests get them as fixtures."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture(autouse=True)
def _no_break_even_of_this_machine(monkeypatch, tmp_path_factory):
    """What `calibrate-target` kept on the developer's machine must not decide what tests see."""
    from onnxcomp.targets.ort import break_even as of_ort
    from onnxcomp.targets.tvm import break_even as of_tvm

    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(of_ort, "cache_path", lambda _: folder / "break_even.json")
    monkeypatch.setattr(of_tvm, "cache_path", lambda _: folder / "break_even_tvm.json")


def _mlp(batch: int | str = "batch", *, hidden: int = 32, opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """Two Gemm with a Relu between, 8 inputs and 4 classes."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(size=(8, hidden)),
        "b1": rng.normal(size=hidden),
        "w2": rng.normal(size=(hidden, 4)),
        "b2": rng.normal(size=4),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="/fc1/Gemm"),
        helper.make_node("Relu", ["h"], ["r"], name="/act/Relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="/fc2/Gemm"),
    ]
    for node, module in zip(nodes, ("fc1", "act", "fc2"), strict=True):
        scopes = str(["", "mlp", f"mlp.{module}", "op"])
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.fixture
def mlp() -> Callable[..., onnx.ModelProto]:
    """Makes a model: `mlp(batch="batch", hidden=32, opset=17)`."""
    return _mlp


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """The model as a file."""
    path = tmp_path / "mlp.onnx"
    onnx.save(_mlp(), path)
    return path


@pytest.fixture
def external_path(tmp_path: Path) -> Path:
    """The model with its weights in `weights.bin`, in a folder of its own."""
    path = tmp_path / "external" / "mlp.onnx"
    path.parent.mkdir()
    onnx.save(_mlp(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


@pytest.fixture
def x() -> np.ndarray:
    """32 samples for the model."""
    return np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32)


@pytest.fixture
def data_path(tmp_path: Path, x: np.ndarray) -> Path:
    """The samples as a file."""
    path = tmp_path / "samples.npz"
    np.savez(path, x=x)
    return path


@pytest.fixture
def run() -> Callable[[Path | bytes, dict[str, Any]], list[np.ndarray]]:
    """Runs a model in stock ONNX Runtime."""
    import onnxruntime

    def run_model(model: Path | bytes, feed: dict[str, Any]) -> list[np.ndarray]:
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        return session.run(None, feed)

    return run_model


@pytest.fixture
def cli(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the command line in this process: `cli("inspect", path)` gives exit code, stdout and stderr."""
    from onnxcomp.cli import main

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onnxcomp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its content."""

    def take(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return take


FAST = """
version = 1
summary = "for tests"

[[passes]]
pass = "cleanup"

[[passes]]
pass = "quantize"
range = "minmax"
weight_range = "minmax"
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """A recipe that quantizes in little time."""
    path = tmp_path / "fast.toml"
    path.write_text(FAST, encoding="utf-8")
    return path
