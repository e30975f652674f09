"""Small models as TVM artifacts, and the runner's view of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from builder import Builder
from onnx import TensorProto

from onnxcomp.state import STATE_KEY
from onnxcomp.target import Array, Feed
from onnxcomp.targets.ort import reference_runner

STEPS = 4


def cnn() -> ir.Model:
    """Float and int8 convolutions, an integer output, and a batch of any size."""
    b = Builder()
    x = b.conv(b.qdq(b.input("x", ["batch", 8, 12, 12])), name="first")
    x = b.conv(b.qdq(b.op("Relu", x)), name="second")
    x = b.op("Conv", b.op("Relu", x), b.floats(10, 8, 3, 3), b.floats(10))
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    b.output(x)
    return b.output(b.op("ArgMax", x, axis=1, keepdims=0), TensorProto.INT64).model()


def mlp() -> ir.Model:
    """Two layers."""
    b = Builder()
    x = b.op("Relu", b.op("MatMul", b.input("x", [3, 20]), b.floats(20, 24)))
    return b.output(b.op("Add", b.op("MatMul", x, b.floats(24, 5)), b.floats(5))).model()


def recurrent() -> ir.Model:
    """Two states; the second is the previous input as it is, which the runner must not overwrite."""
    b = Builder()
    x, h, last = b.input("x", [1, 8]), b.input("h", [1, 8]), b.input("last", [1, 8])
    new = b.op("Tanh", b.op("Add", b.op("MatMul", x, b.floats(8, 8)), b.op("MatMul", h, b.floats(8, 8))))
    handed = b.op("Identity", x)
    b.output(b.op("Concat", new, last, axis=1)).output(new).output(handed)
    states = {"h": new, "last": handed}
    b.metadata[STATE_KEY] = json.dumps(
        [{"input": i, "output": o, "shape": [1, 8], "dtype": "float32"} for i, o in states.items()]
    )
    return b.model()


def feeds(model: ir.Model, steps: int = STEPS) -> list[dict[str, Array]]:
    """Random feeds, one a step, without the state."""
    rng = np.random.default_rng(1)
    state = {entry["input"] for entry in json.loads(model.metadata_props.get(STATE_KEY, "[]"))}
    shapes = {
        str(v.name): [d if isinstance(d, int) else 2 for d in v.shape or ()]
        for v in model.graph.inputs
        if v.name not in state
    }
    return [
        {name: rng.uniform(-2, 2, shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(steps)
    ]


def run(
    command: Sequence[str], artifact: Path, given: Sequence[Feed], folder: Path, *options: str
) -> tuple[dict[str, Array], Mapping[str, Any]]:
    """Outputs of the runner, stacked along the steps, and what it reports."""
    arguments = [str(artifact), "--steps", str(len(given)), "--out", str(folder / "out"), *options]
    for name in given[0]:
        np.save(folder / f"{name}.npy", np.stack([feed[name] for feed in given]))
        arguments += ["--input", f"{name}={folder / name}.npy"]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return {name: np.load(folder / "out" / file) for name, file in report["outputs"].items()}, report


def expected(model: ir.Model, given: Sequence[Feed]) -> dict[str, Array]:
    """The same outputs by ONNX Runtime."""
    state = {entry["output"] for entry in json.loads(model.metadata_props.get(STATE_KEY, "[]"))}
    names = [str(v.name) for v in model.graph.outputs if v.name not in state]
    run_once = reference_runner(model, names)
    results = [run_once(feed) for feed in given]
    return {name: np.stack([found[name] for found in results]) for name in names}
