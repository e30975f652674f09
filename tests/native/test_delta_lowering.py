"""Streaming models on the target: kernels compute what the portable ops say, and holds that save nothing go."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import helper
from streams import Feeds, branching, cnn, delta, frames, largest, looping, recurrent, stream, walk

from onnxcomp import api, native
from onnxcomp.errors import TargetError
from onnxcomp.ops import DELTA_OPS, DOMAIN, SPARSITY
from onnxcomp.passes.carry import Carry
from onnxcomp.state import model_state
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.delta_strip import strip
from onnxcomp.targets.ort.gpu import OrtCuda
from onnxcomp.verbs.resolve import compiled, lowered

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built")


def natives(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.all_nodes() if n.domain == native.DOMAIN)


def portable_ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type in DELTA_OPS]


def on_target(model: ir.Model, feeds: Feeds, folder: Path) -> list[Any]:
    target = OrtCpu()
    session = target.load(compiled(model, target, folder / "artifact"))
    name = session.outputs[0].name
    return [session.run(feed)[name].copy() for feed in feeds]


def mixed() -> ir.Model:
    """What detectors and mobile networks have: SiLU, a split, a slice, squeeze and excitation, padding by name."""
    b = Builder()

    def conv(x: str, out: int, inner: int, kernel: int = 3, **attributes: Any) -> str:
        weight = b.const((b.rng.normal(size=(out, inner, kernel, kernel)) / kernel / inner**0.5).astype(np.float32))
        return b.op("Conv", x, weight, b.floats(out), **attributes)

    def silu(x: str) -> str:
        return b.op("Mul", x, b.op("Sigmoid", x))

    x = b.input("x", [1, 3, 16, 16])
    first = silu(conv(x, 8, 3, strides=[2, 2], auto_pad="SAME_UPPER"))
    halves = [f"half_{i}" for i in range(2)]
    b.nodes.append(helper.make_node("Split", [first, b.const(np.array([4, 4]))], halves, name="split", axis=1))
    part = b.op("Slice", first, *(b.const(np.array([v])) for v in (2, 6, 1)))
    joined = b.op("Concat", b.op("Add", halves[0], part), halves[1], part, axis=1)
    wide = b.op("Clip", conv(joined, 8, 12, 1), b.const(np.float32(-1)), b.const(np.float32(1.5)))
    mean = b.op("ReduceMean", wide, b.const(np.array([2, 3])), keepdims=1)
    gate = b.op("HardSigmoid", conv(b.op("Relu", conv(mean, 4, 8, 1)), 8, 4, 1), alpha=0.25, beta=0.4)
    scaled = b.op("Mul", wide, gate)
    large = b.op("Resize", scaled, "", b.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    small = b.op("MaxPool", large, kernel_shape=[5, 5], pads=[2, 2, 2, 2], strides=[1, 1])
    return b.output(conv(small, 4, 8, 3, auto_pad="SAME_LOWER", dilations=[1, 1])).model(opset=18)


@pytest.mark.parametrize("model", [cnn, mixed])
def test_kernels_lose_nothing_at_threshold_zero(model, tmp_path):
    dense, feeds = model(), frames(40)
    step, _ = delta(dense, feeds, threshold=0.0)
    changed, _ = lowered(step, OrtCpu())
    assert not portable_ops(changed)
    assert not any(n.op_type == "Conv" for n in changed.graph)
    assert largest(on_target(step, feeds, tmp_path), stream(dense, feeds)) < 1e-5


def test_every_layer_of_a_mobile_network_is_a_kernel():
    changed, _ = lowered(delta(mixed(), frames(8), threshold=0.01)[0], OrtCpu())
    found = natives(changed)
    assert found["DeltaConv"] == 5
    assert found["DeltaSlice"] == 3
    pools = {"DeltaGlobalPool", "DeltaPool", "DeltaResize"}
    assert {"DeltaEnter", "DeltaAdd", "DeltaMul", "DeltaConcat", *pools} <= set(found)
    assert {n.op_type for n in changed.graph if n.domain == ""} <= {"Transpose", "Identity"}


@pytest.mark.parametrize("model", [cnn, mixed])
def test_kernels_send_what_the_portable_ops_send(model, tmp_path):
    dense, feeds = model(), frames(30)
    step, _ = delta(dense, feeds, threshold=0.03)
    changed, _ = lowered(step, OrtCpu())
    left = {s.input for s in model_state(step)} - {s.input for s in model_state(changed)}
    for node in [n for n in step.graph if n.op_type.startswith("DeltaHold") and n.inputs[1].name in left]:
        node.inputs[3].const_value = ir.tensor(np.array(0, np.float32), name=node.inputs[3].name)
    wanted = stream(step, feeds)
    assert largest(on_target(step, feeds, tmp_path), wanted) < 2e-3  # a pixel near its threshold now and then
    assert largest(wanted, stream(dense, feeds)) > 1e-4


def test_rounded_streams_are_the_rounded_model(tmp_path):
    dense, feeds = mixed(), frames(30)
    step, _ = delta(dense, feeds, threshold=0.02, semantics="quantized")
    found = on_target(step, feeds, tmp_path)
    target = OrtCpu()
    session = target.load(target.open(tmp_path / "artifact"))
    name = session.outputs[0].name
    for feed, streamed in zip(feeds, found, strict=True):
        session.reset()
        assert np.array_equal(session.run(feed)[name], streamed)


def test_state_of_kernels_is_in_place():
    changed, _ = lowered(delta(cnn(), frames(8), threshold=0.05)[0], OrtCpu())
    states = model_state(changed)
    assert all(s.in_place for s in states if len(s.shape) == 4)
    assert [s.shape for s in states if s.shape[1:] == [16, 16, 3]]  # pixels lie together


def test_integer_weights_of_products(tmp_path):
    dense, feeds = mlp(), walk(60, (1, 256), share=0.1)
    step, _ = delta(dense, feeds, threshold=0.0, weights="int8")
    assert sum(n.op_type == "DequantizeLinear" for n in step.graph) == 1  # both products read one weight
    assert natives(lowered(step, OrtCpu())[0]) == {"DeltaMatMulInt8": 2}
    found = on_target(step, feeds, tmp_path)
    assert largest(found, stream(step, feeds)) < 1e-5
    assert 1e-5 < largest(found, stream(dense, feeds)) < 0.02


def mlp(rows: int = 1, **gemm: Any) -> ir.Model:
    """Two products that read one input, one of them a Gemm with a bias, and a sum that reads it as well."""
    b = Builder()
    x = b.op("Relu", b.input("x", [rows, 256]))
    weight = b.const((b.rng.normal(size=(256, 256)) / 16).astype(np.float32))
    one = b.op("MatMul", x, weight, name="one")
    two = b.op("Gemm", x, weight, b.floats(256), name="two", **gemm)
    return b.output(b.op("Sum", one, two, x)).output(two).model()


@pytest.mark.parametrize("gemm", [{}, {"transB": 1}])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_read_changed_inputs(rows, gemm, tmp_path):
    dense, feeds = mlp(rows, **gemm), walk(60, (rows, 256), share=0.1)
    for threshold, least in ((0.0, -1.0), (0.5, 1e-3)):
        step, _ = delta(dense, feeds, threshold=threshold)
        changed, _ = lowered(step, OrtCpu())
        assert natives(changed) == {"DeltaMatMul": 2}
        folder = tmp_path / str(threshold)
        folder.mkdir()
        found = on_target(step, feeds, folder)
        assert largest(found, stream(step, feeds)) < 1e-5
        assert largest(found, stream(dense, feeds)) > least


@pytest.mark.parametrize(("changes", "reason"), [({"rows": 8}, "8 rows"), ({"share": 1.0}, "inputs change")])
def test_products_that_would_not_pay_stay(changes, reason):
    rows = changes.get("rows", 1)
    feeds = walk(20, (rows, 256), share=changes.get("share", 0.1))
    step, _ = delta(mlp(rows), [{"x": np.abs(f["x"])} for f in feeds], threshold=0.0)
    changed, (*_, report) = lowered(step, OrtCpu())
    assert not natives(changed)
    assert not model_state(changed)
    assert any(reason in e.detail for e in report.edits)


@pytest.mark.parametrize("op_type", ["GRU", "LSTM"])
def test_cells(op_type, tmp_path):
    names = {"h": "h_next", "c": "c_next"} if op_type == "LSTM" else {"h": "h_next"}
    dense = api.rewrite(recurrent(op_type, 64, 96), None, recipe=[Carry(state=names)]).model
    feeds = walk(60, (1, 1, 64), share=0.1)
    for threshold in (0.0, 0.05):
        step, _ = delta(dense, feeds, threshold=threshold)
        for node in step.graph:
            node.metadata_props.pop(SPARSITY, None)
        changed, _ = lowered(step, OrtCpu())
        assert natives(changed)[f"Delta{op_type}"] == 1
        folder = tmp_path / str(threshold)
        folder.mkdir()
        # An element that differs by the threshold, but for the last bit, is sent by one of both.
        assert largest(on_target(step, feeds, folder), stream(step, feeds)) < (0.1 if threshold else 1e-4)


@pytest.mark.parametrize("make", [cnn, mlp])
def test_targets_without_kernels_get_the_dense_model(make):
    dense, feeds = make(), frames(8) if make is cnn else walk(8, (1, 256))
    step, _ = delta(dense, feeds, threshold=0.5)
    changed, _ = lowered(step, OrtCuda())
    assert not natives(changed)
    assert not model_state(changed)
    assert largest(stream(changed, feeds), stream(dense, feeds)) < 1e-6


def test_small_cells_stay_what_they_were(tmp_path):
    dense = api.rewrite(recurrent("GRU"), None, recipe=[Carry(state={"h": "h_next"})]).model
    feeds = walk(30, (1, 1, 6))
    step, _ = delta(dense, feeds, threshold=0.3)
    changed, _ = lowered(step, OrtCpu())
    assert not natives(changed)
    assert [s.input for s in model_state(changed)] == ["h"]
    assert largest(on_target(step, feeds, tmp_path), stream(dense, feeds)) < 1e-6


def test_much_change_everywhere_is_left_to_the_runtime():
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(6)]
    changed, _ = lowered(delta(cnn(), feeds, threshold=0.001)[0], OrtCpu())
    assert not natives(changed)
    assert not model_state(changed)


@pytest.mark.parametrize("make", [cnn, mixed, mlp])
def test_stripping_gives_the_model_back(make):
    dense = make()
    feeds = frames(6) if make is not mlp else walk(6, (1, 256))
    step, _ = delta(dense, feeds, threshold=0.2)
    strip(step)
    assert not portable_ops(step)
    assert not model_state(step)
    assert [v.name for v in step.graph.inputs] == [v.name for v in dense.graph.inputs]
    assert largest(stream(step, feeds), stream(dense, feeds)) < 1e-6


@pytest.mark.parametrize("make", [branching, looping, lambda: looping(scans=True)])
def test_stripping_reaches_branches_and_bodies(make):
    dense, feeds = make(), walk(12, (1, 4))
    if any(v.name == "which" for v in dense.graph.inputs):
        feeds = [{**f, "which": np.array(k % 3 != 0)} for k, f in enumerate(feeds)]
    step, _ = delta(dense, feeds, threshold=0.5)
    assert largest(stream(step, feeds), stream(dense, feeds)) > 1e-3
    strip(step)
    assert not portable_ops(step)
    assert not model_state(step)
    assert [len(n.outputs) for n in step.graph] == [len(n.outputs) for n in dense.graph]
    assert largest(stream(step, feeds), stream(dense, feeds)) < 1e-6


def still_then_moving() -> Feeds:
    """A still picture, then one that is new in every step, then the still one again."""
    rng = np.random.default_rng(1)
    still = frames(8)
    moving = [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(6)]
    return [*still, *moving, *still]


def counted(session: Any, feeds: Feeds) -> tuple[list[Any], list[bool]]:
    """Outputs of a session, and for every step whether the state of the kernels was left alone."""
    outputs, alone = [], []
    name = session.outputs[0].name
    held = [s.input for s in session.states if len(s.shape) == 4 and s.shape[-1] == 8]
    for feed in feeds:
        before = session.state()
        outputs.append(session.run(feed)[name].copy())
        alone.append(all(np.array_equal(before[k], session.state()[k]) for k in held))
    return outputs, alone


def test_steps_with_much_change_run_the_dense_model(tmp_path):
    dense, feeds = cnn(), still_then_moving()
    step, _ = delta(dense, frames(20), threshold=0.01)
    target = OrtCpu()
    artifact = compiled(step, target, tmp_path / "artifact")
    assert artifact.manifest["dense"]["thresholds"] == {"x": pytest.approx(0.01)}
    assert 0 < artifact.manifest["dense"]["share"] < 0.9
    artifact.manifest["dense"]["share"] = 0.5
    session = target.load(artifact)
    outputs, alone = counted(session, feeds)
    assert alone[8:15] == [True] * 7  # and one more, in which the still picture comes back
    assert not alone[15]
    wanted = stream(dense, feeds)
    assert largest(outputs[8:15], wanted[8:15]) < 1e-6
    assert largest(outputs, wanted) < 0.05
    assert np.abs(outputs[-1] - outputs[7]).max() < 0.02


def test_a_manifest_whose_dense_steps_name_no_map_is_refused(tmp_path):
    target = OrtCpu()
    compiled(delta(cnn(), frames(20), threshold=0.01)[0], target, tmp_path / "artifact")
    manifest = tmp_path / "artifact" / "manifest.json"
    for name in ("nothing", "Relu_1_out_sent_in"):
        text = json.loads(manifest.read_text())
        text["dense"]["thresholds"] = {name: 0.1}
        manifest.write_text(json.dumps(text))
        with pytest.raises(TargetError, match="dense names what is no map"):
            target.open(tmp_path / "artifact")


def test_lone_calm_steps_are_soon_waited_out(tmp_path):
    """Every picture twice: the state would be brought up to date for one step that saves anything."""
    target = OrtCpu()
    artifact = compiled(delta(cnn(), frames(20), threshold=0.01)[0], target, tmp_path / "artifact")
    artifact.manifest["dense"]["share"] = 0.5
    rng = np.random.default_rng(2)
    pictures = [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(10)]
    _, alone = counted(target.load(artifact), [p for p in pictures for _ in range(2)])
    assert alone.count(False) <= 3
    assert all(alone[6:])


def test_streams_with_dense_steps_go_on_from_their_state(tmp_path):
    feeds = still_then_moving()
    target = OrtCpu()
    artifact = compiled(delta(cnn(), frames(20), threshold=0.01)[0], target, tmp_path / "artifact")
    artifact.manifest["dense"]["share"] = 0.5
    session = target.load(artifact)
    wanted, _ = counted(session.stream(), feeds)
    name = session.outputs[0].name
    for cut in (3, 10, 15):
        first, second = session.stream(), session.stream()
        found = [first.run(f)[name].copy() for f in feeds[:cut]]
        first.save_state(tmp_path / "state.npz")
        second.load_state(tmp_path / "state.npz")
        found += [second.run(f)[name].copy() for f in feeds[cut:]]
        assert all(np.array_equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_windows_of_padding_alone_are_left_to_the_runtime(tmp_path):
    b = Builder()
    x = b.input("x", [1, 3, 16, 16])
    wide = b.op("Conv", x, b.floats(4, 3, 1, 1), name="padded", pads=[0, 0, 3, 0])
    dense = b.output(b.op("Conv", wide, b.floats(2, 4, 3, 3), name="plain")).model()
    feeds = frames(8)
    step, _ = delta(dense, feeds, threshold=0.0)
    assert natives(lowered(step, OrtCpu())[0])["DeltaConv"] == 1
    assert largest(on_target(step, feeds, tmp_path), stream(dense, feeds)) < 1e-5
