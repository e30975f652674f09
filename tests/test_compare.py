"""Comparison of two models by streaming."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from onnxcomp import compare as module
from onnxcomp.compare import Run, compare, compare_layers
from onnxcomp.errors import DataError, GraphError
from onnxcomp.metrics import cosine, kl_divergence, sqnr, top1_agreement
from onnxcomp.target import Array, Feed

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((6, 5)).astype(np.float32)


def feeds(count: int = 8, rows: int = 4) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((rows, 6)).astype(np.float32)} for _ in range(count)]


def linear(weight: Array) -> Run:
    return lambda feed: {"y": feed["x"] @ weight}


def giving(*outputs: Array) -> Run:
    """A model that returns the given arrays one after the other, whatever it is fed."""
    pending = list(outputs)
    return lambda feed: {"y": pending.pop(0)}


REFERENCE, OTHER = linear(WEIGHT), linear(np.round(WEIGHT * 4) / 4)


def test_streaming_equals_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 10)  # two rows of five at a time
    data = feeds()
    whole = {"x": np.concatenate([f["x"] for f in data])}
    r, o = REFERENCE(whole)["y"], OTHER(whole)["y"]
    found = compare(REFERENCE, OTHER, data, data_name="noise")
    (output,) = found.outputs
    assert (found.data, found.samples, found.seen_by_calibration) == ("noise", 8, False)
    assert output.sqnr == found.worst_sqnr == pytest.approx(sqnr(r, o), rel=1e-6)
    assert output.cosine == pytest.approx(cosine(r, o), rel=1e-6)
    assert output.max_error == pytest.approx(np.abs(r - o).max(), rel=1e-6)
    assert output.top1 == pytest.approx(top1_agreement(r, o), rel=1e-12)
    assert output.kl == pytest.approx(kl_divergence(r, o), rel=1e-6)
    assert output.non_finite == 0


def test_identical_models_are_exact() -> None:
    (output,) = compare(REFERENCE, REFERENCE, feeds(), data_name="noise").outputs
    assert (output.sqnr, output.max_error, output.top1) == (200.0, 0.0, 1.0)
    assert output.cosine == pytest.approx(1.0, rel=1e-9)
    assert output.kl == pytest.approx(0.0, abs=1e-12)


def test_feeds_are_streamed() -> None:
    alive = 0

    def stream() -> Iterator[Feed]:
        nonlocal alive
        for feed in feeds(5):
            alive += 1
            yield feed

    def reference(feed: Feed) -> Mapping[str, Array]:
        seen.append(alive)
        return REFERENCE(feed)

    seen: list[int] = []
    compare(reference, OTHER, stream(), data_name="noise")
    assert seen == [1, 2, 3, 4, 5]


def test_progress_tells_feeds_and_total() -> None:
    told: list[tuple[str, int, int | None]] = []
    compare(REFERENCE, OTHER, feeds(2), data_name="n", progress=lambda *args: told.append(args))
    assert told == [("compare", 1, 2), ("compare", 2, 2)]


@pytest.mark.parametrize(
    ("shape", "classes", "expected"),
    [
        ((4, 5), None, True),  # logits
        ((2, 3, 5), None, True),  # logits of a language model
        ((2, 3, 5, 5), None, False),  # a picture
        ((4, 1), None, False),
        ((5,), None, False),
        ((4, 5), (), False),  # an embedding, by the caller
        ((2, 3, 5, 5), ("y",), True),
    ],
)
def test_what_counts_as_class_scores(shape: tuple[int, ...], classes: Sequence[str] | None, expected: bool) -> None:
    x = RNG.standard_normal(shape).astype(np.float32)
    (output,) = compare(giving(x), giving(x), [{}], data_name="n", classes=classes).outputs
    assert (output.top1 is not None, output.kl is not None) == (expected, expected)


def test_unknown_class_scores_are_an_error() -> None:
    with pytest.raises(DataError, match=r"\['z'\] are no outputs; there are \['y'\]"):
        compare(REFERENCE, OTHER, feeds(), data_name="n", classes=["z"])


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_integers_are_compared_for_equality(dtype: type[np.generic]) -> None:
    r, o = np.array([0, 1, 1, 0]).astype(dtype), np.array([0, 1, 1, 1]).astype(dtype)
    (output,) = compare(giving(r), giving(o), [{}], data_name="n").outputs
    assert (output.top1, output.kl, output.max_error) == (0.75, None, 1.0)


def test_strings_are_compared_for_equality() -> None:
    r, o = np.array(["cat", "dog"], object), np.array(["cat", "cow"], object)
    (output,) = compare(giving(r), giving(o), [{}], data_name="n").outputs
    assert output.top1 == 0.5
    assert output.sqnr == pytest.approx(10 * math.log10(2), rel=1e-9)


def test_half_precision_is_compared_with_single() -> None:
    found = compare(REFERENCE, lambda f: {"y": REFERENCE(f)["y"].astype(np.float16)}, feeds(), data_name="n")
    assert 60 < found.worst_sqnr < 90


def test_nan_is_flagged_and_fails_the_gate() -> None:
    r = np.array([[1.0, 2.0], [2.0, 1.0]], np.float32)
    o = np.array([[1.0, 2.0], [np.nan, 1.0]], np.float32)
    found = compare(giving(r, r), giving(r, o), [{}, {}], data_name="n")
    (output,) = found.outputs
    assert (output.sqnr, output.cosine, output.non_finite, output.top1) == (-200.0, 0.0, 1, 0.75)
    assert output.kl == pytest.approx(0.0, abs=1e-12)
    assert found.non_finite == ("y",)
    assert found.drop() == math.inf


def test_scores_masked_with_infinity_in_both_are_no_error() -> None:
    r = np.array([[1.0, -np.inf, 2.0]], np.float32)
    (output,) = compare(giving(r), giving(r), [{}], data_name="n").outputs
    assert (output.sqnr, output.top1, output.non_finite) == (200.0, 1.0, 0)
    assert output.kl == pytest.approx(0.0, abs=1e-12)


def test_empty_tensors_are_equal() -> None:
    x = np.zeros((0, 5), np.float32)
    (output,) = compare(giving(x), giving(x), [{}], data_name="n").outputs
    assert (output.sqnr, output.cosine, output.top1) == (200.0, 1.0, None)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda feed: {"z": REFERENCE(feed)["y"]}, r"no output 'y'; it has \['z'\]"),
        (lambda feed: {"y": REFERENCE(feed)["y"][:2]}, r"'y' has shape \(4, 5\) in the reference, \(2, 5\), feed 0"),
        (lambda feed: {"y": REFERENCE(feed)["y"].astype(np.int32)}, r"'y' is float32 in the reference and int32"),
        (lambda feed: {"y": [1.0]}, r"'y' of the other model is a list, not a tensor"),
    ],
)
def test_outputs_that_do_not_match_are_errors(other: Run, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        compare(REFERENCE, other, feeds(), data_name="n")


def test_no_data_is_an_error() -> None:
    with pytest.raises(DataError, match="n is empty"):
        compare(REFERENCE, OTHER, [], data_name="n")


def test_metrics_and_their_drop() -> None:
    data = feeds()

    def metric(run: Run) -> dict[str, float]:
        exact = all(np.array_equal(run(f)["y"], REFERENCE(f)["y"]) for f in data)
        return {"accuracy": 0.75 if exact else 0.5, "recall": 0.25}

    found = compare(REFERENCE, OTHER, data, data_name="n", metric=metric)
    assert found.reference_metric == {"accuracy": 0.75, "recall": 0.25}
    assert found.drop() == 0.25
    single = compare(REFERENCE, OTHER, data, data_name="n", metric=lambda run: 0.5)
    assert single.metric == {"metric": 0.5}
    assert compare(REFERENCE, OTHER, data, data_name="n", metric=lambda run: math.nan).drop() == math.inf


def test_drop_without_a_metric_is_of_the_agreement() -> None:
    r, o = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[0, 1, 2, 2]]
    assert compare(giving(r), giving(o), [{}], data_name="n").drop() == 0.25
    assert compare(giving(r[0]), giving(o[0]), [{}], data_name="n").drop() is None


def test_metrics_that_differ_in_name_are_an_error() -> None:
    names = iter(["a", "b"])
    with pytest.raises(DataError, match=r"returns \['a'\] for the reference, \['b'\]"):
        compare(REFERENCE, OTHER, feeds(), data_name="n", metric=lambda run: {next(names): 1.0})


def model(nodes: str, last: str = "y") -> ir.Model:
    rng = np.random.default_rng(2)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        graph (float[4,6] x, float[6,6] w, float[6,6] v, float[6] b) => (float[4,6] {last}) {{ {nodes} }}"""
    )
    graph = ir.from_proto(proto)
    for value in graph.graph.inputs[1:]:
        shape = value.shape.numpy() if value.shape else ()
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=value.name)
        graph.graph.register_initializer(value)
    del graph.graph.inputs[1:]
    for i, node in enumerate(graph.graph):
        node.name = f"{node.op_type}_{i}"
    return graph


@dataclass
class CountingRunner:
    """Runs with the reference evaluator and notes how many values were asked for at a time."""

    asked: list[int] = field(default_factory=list)

    def __call__(self, model: ir.Model, outputs: Sequence[str], /) -> Callable[[Feed], dict[str, Array]]:
        self.asked.append(len(outputs))
        proto = ir.to_proto(model)
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        session = onnx.reference.ReferenceEvaluator(proto)
        return lambda feed: dict(zip(outputs, session.run(None, dict(feed)), strict=True))


FLOAT = "h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = MatMul(r, v)"
QUANTIZED = """
    s = Constant <value_float = 0.0625> () z = Constant <value = int8 {0}> ()
    xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)
    wq = QuantizeLinear(w, s, z) wd = DequantizeLinear(wq, s, z)
    h = MatMul(xd, wd) a = Add(h, b) aq = QuantizeLinear(a, s, z) ad = DequantizeLinear(aq, s, z)
    r = Relu(ad) y = MatMul(r, v)
"""


def test_layers_in_execution_order_with_accumulated_error() -> None:
    a, b, data = model(FLOAT), model(QUANTIZED), feeds(3)
    runner = CountingRunner()
    found = compare_layers(a, b, runner, data)
    assert [(layer.op_type, layer.value) for layer in found] == [("MatMul", "h"), ("MatMul", "y")]
    assert all(layer.node.startswith("MatMul_") for layer in found)
    for layer in found:
        pairs = [[runner(m, [layer.value])(f)[layer.value] for f in data] for m in (a, b)]
        r, o = (np.concatenate(p) for p in pairs)
        assert layer.sqnr == pytest.approx(sqnr(r, o), rel=1e-6)
        assert 5 < layer.sqnr < 60


def test_layers_never_hold_more_values_than_the_limit() -> None:
    names = [f"h{i}" for i in range(10)]
    chain = " ".join(f"{h} = MatMul({before}, w)" for before, h in zip(["x", *names], names, strict=False))
    runner = CountingRunner()
    found = compare_layers(model(chain, "h9"), model(chain, "h9"), runner, feeds(1), limit=4)
    assert runner.asked == [4, 4, 4, 4, 2, 2]  # both models, three sweeps
    assert [layer.value for layer in found] == names
    assert {layer.sqnr for layer in found} == {200.0}


def test_a_bias_stands_for_a_layer_that_was_merged() -> None:
    merged = "a = Gemm(x, w, b) r = Relu(a) y = MatMul(r, v)"
    assert [layer.value for layer in compare_layers(model(merged), model(FLOAT), CountingRunner(), feeds(1))] == [
        "a",
        "y",
    ]


def test_layers_without_a_counterpart_are_left_out() -> None:
    other = "g = MatMul(x, w) a = Sub(g, b) r = Relu(a) y = MatMul(r, v)"
    found = compare_layers(model(FLOAT), model(other), CountingRunner(), feeds(1))
    assert [layer.value for layer in found] == ["y"]


def test_integer_and_reshaped_values_are_left_out() -> None:
    a = model("h = MatMul(x, w) y = MatMul(h, v)")
    runner = CountingRunner()

    def other(asked: ir.Model, outputs: Sequence[str], /) -> Callable[[Feed], dict[str, Array]]:
        run = runner(asked, outputs)
        if asked is a:
            return run
        return lambda feed: {k: x[:1] if k == "h" else x.astype(np.int8) for k, x in run(feed).items()}

    assert compare_layers(a, model("h = MatMul(x, w) y = MatMul(h, v)"), other, feeds(1)) == ()


def test_a_layer_with_nan_is_at_the_bottom() -> None:
    def runner(asked: ir.Model, outputs: Sequence[str], /) -> Callable[[Feed], dict[str, Array]]:
        factor = np.float32(1.0 if asked is a else np.nan)
        return lambda feed: {name: factor * np.ones(3, np.float32) for name in outputs}

    a, b = model(FLOAT), model(FLOAT)
    assert {layer.sqnr for layer in compare_layers(a, b, runner, feeds(1))} == {-200.0}


def test_layers_need_data_that_can_be_read_again() -> None:
    a = model(FLOAT)
    with pytest.raises(DataError, match="only once"):
        compare_layers(a, a, CountingRunner(), iter(feeds(1)), limit=1)
    with pytest.raises(DataError, match="no feed"):
        compare_layers(a, a, CountingRunner(), [])
    with pytest.raises(DataError, match="at least one at a time, not 0"):
        compare_layers(a, a, CountingRunner(), feeds(1), limit=0)
    assert len(compare_layers(a, a, CountingRunner(), iter(feeds(1)))) == 2


@pytest.mark.parametrize("which", ["reference", "other model"])
def test_an_output_that_is_no_tensor_is_refused(which: str) -> None:
    tensor, sequence = np.ones((1, 4), np.float32), [np.ones((1, 4), np.float32)]

    def run(value: object) -> Run:
        return lambda feed: {"y": value}  # type: ignore[dict-item]

    runs = (run(sequence), run(tensor)) if which == "reference" else (run(tensor), run(sequence))
    with pytest.raises(GraphError, match=f"output 'y' of the {which} is a list, not a tensor"):
        compare(*runs, [{"x": tensor}], data_name="d")
