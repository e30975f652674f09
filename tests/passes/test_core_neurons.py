"""CoreInfer's three graphs: what they choose against numpy, what they take out, and what they compute with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, feeds, weight
from builder import Builder

from onnxcomp.model import check_graph
from onnxcomp.passes.core_neurons import CoreNeurons
from onnxcomp.passes.float16 import Float16
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.targets.ort import reference_runner

TOKENS, LAYERS = 24, 4
FEED = feeds(1, TOKENS)[0]


def relu(b: Builder, x: str) -> str:
    return b.op("Relu", x)


def silu(b: Builder, x: str) -> str:
    return b.op("Mul", x, b.op("Sigmoid", x))


def gated(b: Builder, x: str, n: int, act=silu) -> str:
    gate = act(b, b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name=f"gate{n}"))
    up = b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name=f"up{n}")
    return b.op("MatMul", b.op("Mul", gate, up), weight(b, HIDDEN, WIDTH), name=f"down{n}")


def plain(b: Builder, x: str, n: int) -> str:
    """OPT's block: ReLU and biases, here in Gemm with transposed weights on flat rows."""
    y = b.op("Gemm", x, weight(b, HIDDEN, WIDTH), b.floats(HIDDEN), name=f"up{n}", transB=1)
    return b.op("Gemm", b.op("Relu", y), weight(b, WIDTH, HIDDEN), b.floats(WIDTH), name=f"down{n}", transB=1)


def merged(b: Builder, x: str, n: int) -> str:
    """Gate and up in one product with a bias in an Add, split behind it."""
    both = b.op("MatMul", x, weight(b, WIDTH, 2 * HIDDEN), name=f"both{n}")
    parts = b.op("Split", b.op("Add", both, b.floats(2 * HIDDEN)), name=f"split{n}", axis=-1, num_outputs=2)
    b.nodes[-1].output.append(f"second{n}")
    y = b.op("MatMul", b.op("Mul", silu(b, parts), f"second{n}"), weight(b, HIDDEN, WIDTH), name=f"down{n}")
    return b.op("Add", y, b.floats(WIDTH))


BLOCKS = {"gated": gated, "plain": plain, "merged": merged}


def stack(b: Builder, block=gated, layers: int = LAYERS) -> ir.Model:
    """Blocks on a residual stream that is normed before each."""
    y = b.input("x", ["T", WIDTH] if block is plain else [1, "T", WIDTH])
    for n in range(layers):
        normal = b.op("LayerNormalization", y, b.const(np.ones(WIDTH, np.float32)))
        y = b.op("Add", y, block(b, normal, n))
    return b.output(y).model(opset=18)


def feed_of(model: ir.Model) -> dict[str, np.ndarray]:
    return {"x": FEED["x"][0]} if len(model.graph.inputs[0].shape) == 2 else FEED


def edits(report, action: str) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == action}


def run(model: ir.Model, feed: dict[str, np.ndarray], *, optimize: bool = True) -> dict[str, np.ndarray]:
    check_graph(model)
    return reference_runner(model, [v.name for v in model.graph.outputs], optimize=optimize)(feed)


def stages(model: ir.Model, step: CoreNeurons, run_passes, data=None) -> list[ir.Model]:
    made = []
    for stage in ("prefill", "gather", "decode"):
        made.append(model.clone())
        run_passes(made[-1], replace(step, stage=stage), data=data)
    return made


def decoded(graphs: list[ir.Model], feed: dict[str, np.ndarray]) -> tuple[dict, dict, np.ndarray]:
    """What the three graphs say, each fed with what the one before put out."""
    chosen = run(graphs[0], feed)
    weights = run(graphs[1], {k: v for k, v in chosen.items() if k.startswith("core_index")})
    name = graphs[2].graph.outputs[0].name
    return chosen, weights, run(graphs[2], {**feed, **weights})[name]


def core(h: np.ndarray, share: float, keep: float) -> tuple[np.ndarray, np.ndarray]:
    """The paper's choice: rows of `h` are tokens. How often neurons are core, and the sorted most frequent ones."""
    number = max(1, int(share * (h > 0).sum(axis=1).mean() + 1e-3))
    count = np.zeros(h.shape[1], int)
    for row in h:
        order = np.argsort(-row)[:number]
        count[order[row[order] > 0]] += 1
    return count, np.sort(np.argsort(-count, kind="stable")[: max(1, round(keep * h.shape[1]))])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("share", "keep"), [(0.4, 0.4), (0.2, 0.1), (1.0, 0.75), (0.01, 0.01)])
def test_choice_is_that_of_the_paper(share, keep, block, b, run_passes):
    model = stack(b, BLOCKS[block])
    feed, values = feed_of(model), [model.graph.node(f"down{n}").inputs[0].name for n in range(LAYERS)]
    hidden = reference_runner(model, values)(feed)
    before = run(model, feed)
    step = CoreNeurons(keep=keep, token_share=share, skip_layers=1, values="positive")
    assert set(edits(run_passes(model, step), "applied")) == {"down1", "down2", "down3"}
    found = run(model, feed)
    assert [k for k in found if k.startswith("core_index")] == [f"core_index.{n}" for n in (1, 2, 3)]
    for n in range(1, LAYERS):
        count, index = core(hidden[values[n]].reshape(-1, HIDDEN), share, keep)
        np.testing.assert_array_equal(found[f"core_count.{n}"], count)
        np.testing.assert_array_equal(found[f"core_index.{n}"], index)
    for name, value in before.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("form", ["float", "matmulnbits", "qdq"])
def test_all_neurons_give_the_dense_outputs(form, block, b, run_passes):
    model = stack(b, BLOCKS[block])
    if form != "float":
        run_passes(model, WeightOnly(bits=8, block_size=16, min_weights=1, form=form, accuracy_level=0))
    feed = feed_of(model)
    # Optimised, integers behind DequantizeLinear would be multiplied with activations of 8 bits.
    (want,) = run(model, feed, optimize=form != "qdq").values()
    _, _, found = decoded(stages(model, CoreNeurons(keep=1.0, skip_layers=0), run_passes), feed)
    # Blocks of 8 bits are dequantized here by another op than there.
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_some_neurons_give_what_masks_give(keep, block, b, run_passes):
    """As if the values of all other neurons were zero; weights are no initializers of the decode graph any more."""
    model = stack(b, BLOCKS[block], layers=1)
    feed, down = feed_of(model), model.graph.node("down0")
    graphs = stages(model, CoreNeurons(keep=keep, skip_layers=0), run_passes)
    chosen, weights, found = decoded(graphs, feed)
    kept = round(keep * HIDDEN)
    assert weights["core_up.0"].shape == (WIDTH, kept)
    assert weights["core_down.0"].shape == (kept, WIDTH)
    assert all(v.const_value.size <= 2 * WIDTH for v in graphs[2].graph.initializers.values())
    assert {v.name for v in graphs[2].graph.inputs} == {"x", *weights}
    run_mask = model.clone()
    mask = np.zeros(HIDDEN, np.float32)
    mask[chosen["core_index.0"]] = 1
    stored = run_mask.graph.initializers[down.inputs[1].name]
    array = stored.const_value.numpy()
    stored.const_value = ir.tensor(array * (mask[:, None] if block != "plain" else mask), name=stored.name)
    (want,) = run(run_mask, feed).values()
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_int8_is_close_to_float(keep, block, b, run_passes):
    """Weights have 7 bits or 8, activations of 24 tokens share one range of 8 bits."""
    model = stack(b, BLOCKS[block], layers=2)
    feed = feed_of(model)
    step = CoreNeurons(keep=keep, skip_layers=0)
    _, _, want = decoded(stages(model, step, run_passes), feed)
    graphs = stages(model, replace(step, weights="int8"), run_passes)
    _, weights, found = decoded(graphs, feed)
    assert weights["core_up.0"].dtype == weights["core_down.1"].dtype == np.int8
    products = [n for n in graphs[2].graph if n.op_type == "MatMulInteger"]
    assert len(products) == (4 if block == "plain" else 6)
    assert all(len(n.inputs) == 2 for n in products), "with a zero point the runtime packs the weight in every run"
    delta = np.linalg.norm(found - want) / np.linalg.norm(want - next(iter(feed.values())))
    assert 0 < delta < 0.05


def test_half_precision(b, run_passes):
    model = stack(b)
    run_passes(model, Float16(slow_target="convert", min_weights=0))
    feed = {model.graph.inputs[0].name: FEED["x"]}
    (want,) = run(model, feed).values()
    graphs = stages(model, CoreNeurons(keep=1.0, skip_layers=0), run_passes)
    _, weights, found = decoded(graphs, feed)
    assert weights["core_gate.0"].dtype == np.float16
    np.testing.assert_allclose(found, want, rtol=0, atol=4e-3 * np.abs(want).max())
    report = run_passes(model.clone(), CoreNeurons(weights="int8", skip_layers=0))
    assert "float16" in edits(report, "refused")["down0"]


def test_clusters(b, run_passes):
    """Prompts of three kinds; a new one gets the neurons that those of its kind use most."""
    model = stack(b, lambda b, x, n: gated(b, x, n, relu), layers=3)
    random = np.random.default_rng(5)
    kinds = random.normal(size=(3, 1, 1, WIDTH)).astype(np.float32) * 4

    def prompt(kind: int, tokens: int = 30) -> dict[str, np.ndarray]:
        return {"x": kinds[kind] + random.normal(size=(1, tokens, WIDTH)).astype(np.float32)}

    data = [prompt(i % 3) for i in range(12)]
    step = CoreNeurons(keep=0.3, skip_layers=0, clusters=3)
    guided, alone = model.clone(), model.clone()
    report = run_passes(guided, step, data=data)
    assert "(4, 4, 4)" in edits(report, "applied")["down0"]
    run_passes(alone, replace(step, clusters=0))
    chosen = [run(alone, feed) for feed in data]
    sets = [[c[f"core_index.{n}"][c[f"core_count.{n}"][c[f"core_index.{n}"]] > 0] for n in range(3)] for c in chosen]
    seen = set()
    for kind in range(3):
        found = run(guided, prompt(kind, 5))
        seen.add(int(found["core_cluster"]))
        for n in range(3):
            often = np.bincount(np.concatenate([s[n] for s in sets[kind::3]]), minlength=HIDDEN)
            want = np.sort(np.argsort(-often, kind="stable")[: round(0.3 * HIDDEN)])
            np.testing.assert_array_equal(found[f"core_index.{n}"], want)
    assert len(seen) == 3


def test_float_weights_on_disk(b, run_passes, tmp_path):
    """Weights that stay in a file are gathered from copies in another file."""
    from onnxcomp.model import has_external, load

    model = stack(b, layers=2)
    ir.save(model, tmp_path / "model.onnx", external_data="model.data")
    loaded = load(tmp_path / "model.onnx")
    for value in loaded.graph.initializers.values():
        assert value.const_value is not None
    assert has_external(loaded)
    step = CoreNeurons(skip_layers=0)
    want = decoded(stages(model, step, run_passes), FEED)[2]
    np.testing.assert_array_equal(decoded(stages(loaded, step, run_passes), FEED)[2], want)
