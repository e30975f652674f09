"""Streams of convolutional models by TVM: against the dense model, and the model that the pass `delta` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm")

from builder import Builder  # noqa: E402
from streams import Feeds, cnn, delta, frames, largest, stream  # noqa: E402
from tvm_harness import Compiled, lowered, machines  # noqa: E402

from onnxcomp.errors import DeviceError  # noqa: E402
from onnxcomp.ops import SPARSITY  # noqa: E402
from onnxcomp.rewrite import Context  # noqa: E402
from onnxcomp.state import model_state  # noqa: E402
from onnxcomp.target import Session  # noqa: E402
from onnxcomp.targets.tvm import TvmCpu  # noqa: E402
from onnxcomp.targets.tvm.lower.delta import Delta  # noqa: E402
from onnxcomp.verbs.resolve import compiled  # noqa: E402

Array = np.ndarray[Any, Any]


def mobile() -> ir.Model:
    """What mobile networks have: depthwise convolutions, squeeze and excitation, SiLU, a residual sum."""
    b = Builder()
    first = first_of(b)
    wide = silu(b, layer(b, silu(b, layer(b, first, 24, 8, 1)), 24, 1, group=24))
    gate = b.op("Sigmoid", layer(b, b.op("GlobalAveragePool", wide), 24, 24, 1))
    second = b.op("Add", layer(b, b.op("Mul", wide, gate), 8, 24, 1), first)
    return b.output(b.op("Flatten", b.op("GlobalAveragePool", second))).model(opset=18)


def small() -> ir.Model:
    """Two convolutions."""
    b = Builder()
    return b.output(b.op("Flatten", layer(b, first_of(b), 8, 1, group=8))).model(opset=18)


def first_of(b: Builder) -> str:
    """The first layer of both."""
    return silu(b, layer(b, b.input("x", [1, 3, 16, 16]), 8, 3, strides=[2, 2]))


def layer(b: Builder, x: str, out: int, inner: int, kernel: int = 3, **attributes: Any) -> str:
    weight = b.const((b.rng.normal(size=(out, inner, kernel, kernel)) / kernel / inner**0.5).astype(np.float32))
    return b.op("Conv", x, weight, b.floats(out), pads=[kernel // 2] * 4, **attributes)


def silu(b: Builder, x: str) -> str:
    return b.op("Mul", x, b.op("Sigmoid", x))


def session(model: ir.Model, folder: Path) -> Session:
    target = TvmCpu()
    return target.load(compiled(model, target, folder / "artifact"))


def outputs(run: Session, feeds: Feeds) -> list[Array]:
    return [run.run(feed)[run.outputs[0].name].copy() for feed in feeds]


@pytest.mark.parametrize("model", [cnn, mobile])
def test_streams_lose_nothing_at_threshold_zero(model: Callable[[], ir.Model], tmp_path: Path) -> None:
    original, feeds = model(), frames(30)
    step, _ = delta(original, feeds, threshold=0.0)
    found = Counter(n.op_type for n in lowered(step, [Delta()]).graph)
    assert found["DeltaConv"] + found["DeltaDepthwise"] > 4
    assert "Conv" not in found
    assert largest(outputs(session(step, tmp_path), feeds), stream(original, feeds)) < 1e-5


def test_streams_go_on_from_their_state(tmp_path: Path) -> None:
    feeds = frames(20)
    step, _ = delta(mobile(), feeds, threshold=0.03)
    run = session(step, tmp_path)
    whole = outputs(run, feeds)
    assert largest(whole, stream(mobile(), feeds)) > 1e-4
    run.reset()
    outputs(run, feeds[:10])
    state = run.state()
    copies = {name: array.copy() for name, array in state.items()}
    other = run.stream()
    assert np.array_equal(outputs(other, feeds), whole)
    assert np.array_equal(outputs(run, feeds[10:]), whole[10:])
    assert all(np.array_equal(array, copies[name]) for name, array in state.items())
    other.restore(state)
    assert np.array_equal(outputs(other, feeds[10:]), whole[10:])
    assert all(np.array_equal(array, copies[name]) for name, array in state.items())


def test_kernels_send_what_the_portable_ops_send(tmp_path: Path) -> None:
    feeds = frames(30)
    step, _ = delta(mobile(), feeds, threshold=0.03)
    left = {s.input for s in model_state(step)} - {s.input for s in model_state(lowered(step, [Delta()]))}
    for node in [n for n in step.graph if n.op_type.startswith("DeltaHold") and n.inputs[1].name in left]:
        node.inputs[3].const_value = ir.tensor(np.array(0, np.float32), name=node.inputs[3].name)
    assert largest(outputs(session(step, tmp_path), feeds), stream(step, feeds)) < 2e-3


def test_rounded_streams_are_the_rounded_model(tmp_path: Path) -> None:
    feeds = frames(20)
    step, _ = delta(small(), feeds, threshold=0.02, semantics="quantized")
    run = session(step, tmp_path)
    found = outputs(run, feeds)
    for feed, streamed in zip(feeds, found, strict=True):
        run.reset()
        assert np.array_equal(outputs(run, [feed])[0], streamed)


def test_streams_of_which_most_changes_run_densely() -> None:
    step, _ = delta(cnn(), frames(8), threshold=0.05)
    for node in step.graph:
        if node.op_type.startswith("DeltaHold"):
            node.metadata_props[SPARSITY] = "0.3"
    left = lowered(step, [Delta()])
    assert model_state(step)
    assert not model_state(left)
    assert not [n for n in left.graph if n.domain.startswith("onnxcomp")]


def test_an_edit_says_when_the_dense_model_would_be_faster() -> None:
    step, _ = delta(small(), frames(8), threshold=0.05)
    edits = Delta().apply(step, Context(capabilities=TvmCpu().capabilities()))
    assert [e.op_type for e in edits if "longer than densely" in e.detail] == ["DeltaHoldPixels"]


def test_state_is_written_in_place() -> None:
    step, _ = delta(small(), frames(8), threshold=0.05)
    changed = lowered(step, [Delta()])
    states = {s.input: s for s in model_state(changed)}
    assert [s.in_place for s in states.values()].count(False) == 1  # whether the stream has started
    run = Compiled(changed, [], machines()[-1])
    given = {name: spec.zeros() for name, spec in states.items()} | frames(1)[0]
    arguments = {name: tvm.runtime.tensor(np.asarray(given[name])) for name in run.names if name in given}
    found = run.call([*arguments.values(), *run.bind({})])
    results = dict(zip((str(v.name) for v in changed.graph.outputs), found, strict=True))
    assert all(results[s.output].same_as(arguments[s.input]) for s in states.values() if s.in_place)


def test_a_run_that_fails_refuses_to_go_on_with_state_that_may_be_half_written(tmp_path: Path) -> None:
    feeds = frames(4)
    step, _ = delta(small(), feeds, threshold=0.05)
    run = session(step, tmp_path)
    run.run(feeds[0])
    kept = run.state()
    wanted = run.run(feeds[1])
    machine = run._loaded  # type: ignore[attr-defined]
    works = machine.run
    machine.run = lambda values: 1 / 0
    with pytest.raises(DeviceError, match=r"lost: call reset"):
        run.run(feeds[2])
    machine.run = works
    for refused in (lambda: run.run(feeds[2]), run.state):
        with pytest.raises(DeviceError, match="half written"):
            refused()
    run.restore(kept)
    found = run.run(feeds[1])
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
