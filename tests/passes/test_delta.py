"""The pass `delta`: streams that compute what changed, against the model that computes all."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import helper
from streams import branching, cnn, delta, frames, largest, looping, recurrent, stream, walk

from onnxcomp import api
from onnxcomp.errors import OnnxcompError, PassError
from onnxcomp.ops import DELTA_OPS, DOMAIN
from onnxcomp.passes.carry import Carry
from onnxcomp.passes.delta import Delta
from onnxcomp.select import Select
from onnxcomp.state import model_state


def carried(op_type: str) -> ir.Model:
    names = {"h": "h_next", "c": "c_next"} if op_type == "LSTM" else {"h": "h_next"}
    return api.rewrite(recurrent(op_type), None, recipe=[Carry(state=names)]).model


def holds(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph.all_nodes() if n.domain == DOMAIN]


def details(edits, action: str = "applied") -> list[str]:
    return [e.detail for e in edits if e.action == action]


@pytest.mark.parametrize("semantics", ["residual", "quantized"])
def test_nothing_is_lost_at_threshold_zero(semantics):
    model, feeds = cnn(), frames(100)
    if semantics == "quantized":
        # Rounding to multiples of a power of two far below the values' precision changes nothing.
        step, edits = delta(model, feeds[:4], threshold=2.0**-40, semantics=semantics)
    else:
        step, edits = delta(model, feeds[:4], threshold=0.0)
    assert len(holds(step)) == 6
    assert len(details(edits)) == 7  # shapes fixed, and six values
    assert largest(stream(step, feeds), stream(model, feeds)) < 1e-6


@pytest.mark.parametrize("op_type", ["GRU", "LSTM"])
def test_cells_lose_nothing_at_threshold_zero(op_type):
    model, feeds = carried(op_type), walk(100, (1, 1, 6))
    step, edits = delta(model, feeds[:2], threshold=0.0)
    assert [n.op_type for n in holds(step)] == [f"Delta{op_type}", "DeltaHold"]
    assert not details(edits, "refused")
    assert largest(stream(step, feeds), stream(model, feeds)) < 1e-6


@pytest.mark.parametrize("op_type", ["GRU", "LSTM"])
def test_a_cell_skips_small_changes(op_type):
    model, feeds = carried(op_type), walk(60, (1, 1, 6), share=0.2)
    step, edits = delta(model, feeds, threshold=0.05)
    error = largest(stream(step, feeds), stream(model, feeds))
    assert 1e-4 < error < 0.3
    assert any("elements sent" in d for d in details(edits))


def test_state_is_listed_and_starts_at_zero():
    step, _ = delta(cnn(), frames(2), threshold=0.1)
    states = model_state(step)
    assert {s.dtype for s in states} == {"float32", "bool"}
    assert len(states) == 7  # six values, and whether the stream has started
    assert all(not s.zeros().any() for s in states)
    names = {v.name for v in step.graph.inputs}
    assert names == {"x"} | {s.input for s in states}
    onnx.checker.check_model(ir.to_proto(step), full_check=True)


def test_the_first_step_is_the_dense_one():
    model, feeds = cnn(), frames(1)
    step, _ = delta(model, feeds, threshold=10.0)
    assert largest(stream(step, feeds), stream(model, feeds)) < 1e-6


def test_unsent_changes_add_up():
    """A drift by less than the threshold a step is sent in the end: the residual is kept."""
    b = Builder()
    b.output(b.op("MatMul", b.input("x", [1, 4]), b.const(np.eye(4, dtype=np.float32))))
    model = b.model()
    feeds = [{"x": np.full((1, 4), 0.1 * k, np.float32)} for k in range(30)]
    step, _ = delta(model, feeds[:2], threshold=0.25)
    errors = [np.abs(f - w).max() for f, w in zip(stream(step, feeds), stream(model, feeds), strict=True)]
    assert max(errors) <= 0.25 + 1e-6
    assert max(errors) > 0.1


def test_a_pixel_is_sent_whole_and_an_element_alone():
    model, feeds = cnn(), frames(6)
    step, _ = delta(model, feeds, threshold=0.2)
    names = [s.output for s in model_state(step) if s.shape[1:2] == [3]]
    before, after = (v[0] for v in stream(step, feeds, names)[1::2][:2])
    changed = before != after
    assert changed.any()
    assert np.array_equal(changed.any(axis=1), changed.all(axis=1))


def test_rounded_streams_equal_the_rounded_model_whatever_came_before():
    model, feeds = cnn(), frames(40)
    step, _ = delta(model, feeds[:4], threshold=0.05, semantics="quantized")
    found = stream(step, feeds)
    fresh = [stream(step, [feed])[0] for feed in feeds]  # each frame after a reset: dense
    assert largest(found, fresh) == 0
    assert 1e-4 < largest(found, stream(model, feeds)) < 0.2


def test_thresholds_are_searched_for_an_error():
    model, feeds = cnn(), frames(40)
    step, edits = delta(model, feeds[:20], max_error=0.02)
    wanted, found = stream(model, feeds[20:]), stream(step, feeds[20:])
    error = np.sqrt(sum(np.square(f - w).sum() for f, w in zip(found, wanted, strict=True)))
    error /= np.sqrt(sum(np.square(w).sum() for w in wanted))
    assert 0.0005 < error < 0.05
    assert any("of the budget" in d for d in details(edits))
    assert any("places sent a step" in d for d in details(edits))
    levels = [float(n.inputs[3].const_value.numpy()) for n in holds(step)]
    assert all(level > 0 for level in levels)


def test_a_search_by_layers_sends_no_more_than_a_global_one():
    model, feeds = cnn(), frames(24)

    def density(**options) -> float:
        step, _ = delta(model, feeds, **options)
        return float(np.mean([1 - float(n.metadata_props["onnxcomp.sparsity"]) for n in holds(step)]))

    by_layers = density(max_error=0.03, search="layers")
    assert by_layers <= density(max_error=0.015)
    assert by_layers < density(threshold=0.0)


def test_thresholds_for_classes():
    model, feeds = cnn(), frames(40)
    step, _ = delta(model, feeds, min_agreement=1.0)
    wanted, found = stream(model, feeds), stream(step, feeds)
    assert all(np.argmax(f) == np.argmax(w) for f, w in zip(found, wanted, strict=True))
    assert largest(found, wanted) > 0


def test_values_in_the_branches_of_an_if():
    """State is handed out of the branch that runs, and kept by the other."""
    model = branching()
    feeds = [{**f, "which": np.array(k % 3 != 0)} for k, f in enumerate(walk(30, (1, 4)), 1)]
    step, _ = delta(model, feeds, threshold=0.0)
    assert len(holds(step)) == 2  # x outside, and what is doubled inside
    assert largest(stream(step, feeds), stream(model, feeds)) < 1e-6
    loose, _ = delta(model, feeds, threshold=0.5)
    assert largest(stream(loose, feeds), stream(model, feeds)) > 1e-3


@pytest.mark.parametrize("scans", [False, True])
def test_values_in_the_body_of_a_loop(scans):
    """A Loop hands what was sent from one iteration to the next, and out of the step."""
    model = looping(scans=scans)
    feeds = walk(20, (1, 4))
    step, _ = delta(model, feeds, threshold=0.0)
    assert [n.op_type for n in holds(step)] == ["DeltaHold"]
    assert largest(stream(step, feeds), stream(model, feeds)) < 1e-6
    assert {tuple(s.shape) for s in model_state(step)} == {(1, 4), ()}


def test_float16_values_are_held():
    model, feeds = cnn(dtype=np.float16), frames(10, dtype=np.float16)
    step, _ = delta(model, feeds[:2], threshold=0.0)
    assert len(holds(step)) == 6
    assert largest(stream(step, feeds), stream(model, feeds)) < 1e-6


def test_a_value_that_several_read_is_held_once():
    b = Builder()
    x = b.op("Relu", b.input("x", [1, 4]))
    products = [b.op("MatMul", x, b.floats(4, 4)) for _ in range(3)]
    model = b.output(b.op("Sum", *products, x)).model()
    step, _ = delta(model, walk(3, (1, 4)), threshold=0.1)
    assert len(holds(step)) == 1
    (held,) = (n.outputs[0] for n in holds(step))
    assert len({node for node, _ in held.uses()}) == 4


def test_an_output_that_is_read_stays_as_it_was():
    b = Builder()
    middle = b.op("Relu", b.input("x", [1, 4]), name="middle")
    b.output(middle).output(b.op("MatMul", middle, b.floats(4, 4)))
    feeds = walk(8, (1, 4))
    step, _ = delta(b.model(), feeds, threshold=0.5)
    assert largest(stream(step, feeds), [np.maximum(f["x"], 0) for f in feeds]) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"direction": b"reverse"}, "backwards"),
        ({"linear_before_reset": 0}, "linear_before_reset"),
        ({"activations": [b"Relu", b"Tanh"]}, "other activations"),
    ],
)
def test_cells_that_cannot_be_streamed_say_why(change, reason):
    model = carried("GRU")
    (cell,) = (n for n in model.graph if n.op_type == "GRU")
    for name, value in change.items():
        values = [v.decode() for v in value] if isinstance(value, list) else value
        cell.attributes[name] = (
            ir.AttrStrings(name, values)
            if isinstance(values, list)
            else ir.AttrString(name, value.decode()) if isinstance(value, bytes) else ir.AttrInt64(name, value)
        )  # fmt: skip
    feeds = walk(3, (1, 1, 6))
    _, edits = delta(model, feeds, threshold=0.1)
    assert any(reason in d for d in details(edits, "refused"))


def test_products_of_two_computed_values_say_why():
    b = Builder()
    x = b.input("x", [4, 4])
    model = b.output(b.op("MatMul", x, b.op("Transpose", x))).model()
    step, edits = delta(model, walk(2, (4, 4)), threshold=0.1)
    assert not model_state(step)
    assert details(edits, "refused") == ["its weight is computed, so that all of it may change in every step"]


def test_a_selector_and_patterns_choose():
    model, feeds = cnn(), frames(4)
    step, _ = delta(model, feeds, threshold=0.1, where=Select(op=("Gemm",)))
    assert [n.op_type for n in holds(step)] == ["DeltaHold"]
    step, _ = delta(model, feeds, threshold={"classify": 0.25})
    assert sorted({float(n.inputs[3].const_value.numpy()) for n in holds(step)}) == [0, 0.25]


def test_a_second_application_changes_nothing():
    model, feeds = cnn(), frames(4)
    once, _ = delta(model, feeds, threshold=0.1)
    twice, edits = delta(once, feeds, threshold=0.3)
    assert len(holds(twice)) == len(holds(once))
    assert set(details(edits, "refused")) == {"its input is held already"}


def test_without_data_shapes_have_to_be_known():
    found = api.rewrite(cnn(), None, recipe=[Delta(threshold=0.1)])
    assert not model_state(found.model)
    reasons = {e.detail for e in found.passes[-1].edits if e.action == "refused"}
    assert any("give --data" in r for r in reasons)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threshold": 0.1, "max_error": 0.1}, "both say how much"),
        ({"max_error": 0.1}, "give one with --data"),
        ({"threshold": 0.0, "semantics": "quantized"}, "multiples of 0"),
    ],
)
def test_contradictions_are_refused_early(options, text):
    with pytest.raises(PassError, match=text):
        api.rewrite(cnn(), None, recipe=[Delta(**options)])


def test_a_still_sequence_says_that_it_tells_nothing():
    model = cnn()
    _, edits = delta(model, frames(1) * 8, max_error=0.02)
    assert any("give one in which more happens" in d for d in details(edits, "refused"))
    step, edits = delta(model, frames(20), max_error=2e-4)
    assert not any("in which more happens" in d for d in details(edits, "refused"))
    moved = [{"x": f["x"][..., ::-1].copy()} for f in frames(20)]  # changes that calibration did not see are sent
    assert largest(stream(step, [*frames(4), *moved]), stream(model, [*frames(4), *moved])) < 0.05


def test_one_feed_is_no_sequence():
    with pytest.raises(OnnxcompError, match="at least 2 feeds"):
        delta(cnn(), frames(1), max_error=0.1)


def test_carry_refuses_what_does_not_fit():
    for options, text in [
        ({"state": {"h": "nothing"}}, "no input 'h' or no output 'nothing'"),
        ({"state": {"h": "h_next"}, "sizes": {"h": (2, 1, 5)}}, "has shape"),
        ({"state": {"h": "h_next"}, "sizes": {"x": (1, 1, 6)}}, "which state does not name"),
    ]:
        with pytest.raises(PassError, match=text):
            api.rewrite(recurrent("GRU"), None, recipe=[Carry(**options)])


@pytest.mark.parametrize("name", ["DeltaHold", "DeltaHoldPixels", "DeltaGRU", "DeltaLSTM"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_ops_run_as_their_references(name, dtype):
    rng = np.random.default_rng(3)
    gates = {"DeltaGRU": 3, "DeltaLSTM": 4}.get(name)
    if gates is None:
        x, last = rng.normal(size=(2, 2, 3, 5)).astype(dtype)
        x[0, 0, 0] = np.nan
        arrays = [x, last, np.array(True), np.array(0.7, dtype)]
    else:
        cells = [rng.normal(size=(1, 2, 4)).astype(dtype) for _ in range(gates - 2)]
        x, x_last = rng.normal(size=(2, 1, 2, 3)).astype(dtype)
        h_last = rng.normal(size=(1, 2, 4)).astype(dtype)
        weights = [rng.normal(size=(1, gates * 4, n)).astype(dtype) for n in (3, 4)]
        bias = rng.normal(size=(1, 8 * gates)).astype(dtype)
        levels = [np.array(v, dtype) for v in (0.5, 0.3)]
        arrays = [x, *cells, x_last, h_last, *levels, *weights, bias]
    op = DELTA_OPS[name]
    wanted = op.reference(*arrays)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    names = [f"i{k}" for k in range(len(arrays))]
    outputs = [f"o{k}" for k in range(len(wanted))]
    node = helper.make_node(name, names, outputs, domain=DOMAIN)
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph([node], "call", infos, [helper.make_tensor_value_info(o, kind, None) for o in outputs])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    op.install(model)
    (found,) = stream(model, [dict(zip(names, arrays, strict=True))], outputs)
    tolerance = 1e-5 if dtype is np.float32 else 5e-3
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
