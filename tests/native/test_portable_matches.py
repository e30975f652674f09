"""The file that `threshold` writes computes the same in onnx's evaluator, in stock onnxruntime and on the target."""

from __future__ import annotations

import math
from pathlib import Path

import blocks
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builder import Builder
from onnx.reference import ReferenceEvaluator

from onnxcomp import api, native
from onnxcomp.metrics import sqnr
from onnxcomp.ops import DOMAIN
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.threshold import Threshold
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner

ort = pytest.importorskip("onnxruntime")
needs_library = pytest.mark.skipif(not native.available(), reason="the native library was not built")

WIDTH, HIDDEN, TOKENS = 64, 192, 24
METHODS, STORAGES, FORMS = ("cats", "chess", "topk", "teal"), ("keep", "int8", "int4"), ("gated", "plain")

# Single precision: sums of up to 192 products, each off by a part in 2^24, three layers one after the other.
FLOAT = 1e-5
# For integer weights a kernel rounds inputs to steps of 1/127 of the largest of their chunk, which is less than eight
# times any of the chunk; errors of rounding have a standard deviation of a step over the root of 12. Where it is the
# product of input and scale that is rounded (4 bits), at most 64 of them share the step that one of them makes large,
# which comes to the same. Tokens at once are rounded in spans of 64, with anything beyond six times the mean apart.
ROWS = 8 / 127 / math.sqrt(12)
# The input of an up projection is rounded in blocks of 32, of which the largest alone may be all there is.
DOTS = math.sqrt(32 / 12) / 127
SLOPE = 1.1  # of SiLU and GELU, at most


def model(form: str) -> ir.Model:
    """A feed-forward block: gated by SiLU without biases, or GELU with biases as Gemm."""
    b = Builder()
    if form == "gated":
        x = b.input("x", [1, "tokens", WIDTH])
        gate = blocks.silu(b, b.op("MatMul", x, blocks.weight(b, WIDTH, HIDDEN), name="gate"))
        up = b.op("MatMul", x, blocks.weight(b, WIDTH, HIDDEN), name="up")
        y = b.op("MatMul", b.op("Mul", gate, up), blocks.weight(b, HIDDEN, WIDTH), name="down")
    else:
        x = b.input("x", ["tokens", WIDTH])
        y = b.op("Gemm", x, blocks.weight(b, WIDTH, HIDDEN), b.floats(HIDDEN), name="up")
        y = b.op("Gemm", blocks.gelu(b, y), blocks.weight(b, HIDDEN, WIDTH), b.floats(WIDTH), name="down")
    built = b.output(y).model(opset=18)
    built.graph.outputs[0].shape = built.graph.inputs[0].shape
    return built


def feeds(form: str) -> list[Feed]:
    random = np.random.default_rng(0)
    shape = (1, TOKENS, WIDTH) if form == "gated" else (TOKENS, WIDTH)
    return [{"x": random.normal(size=shape).astype(np.float32)} for _ in range(5)]


def write_portable(original: ir.Model | Path, step: Threshold, data: list[Feed], path: Path) -> None:
    """Writes what the pass makes without its notes, by which a target takes dense products where kernels do not pay."""
    changed = api.rewrite(original, None, recipe=[Cleanup(), step], data=data, check="none").model
    for node in changed.graph:
        if node.domain == DOMAIN:
            node.metadata_props.clear()
    ir.save(changed, path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file of a case, made once."""
    folder = tmp_path_factory.mktemp("portable")

    def write(method: str, storage: str, form: str) -> Path:
        path = folder / f"{method}_{storage}_{form}.onnx"
        if not path.is_file():
            step = Threshold(method=method, sparsity=0.5, weights=storage, only_if_faster=False)
            write_portable(model(form), step, feeds(form)[:4], path)
        return path

    return write


def stock(path: Path, feed: Feed) -> np.ndarray:
    """Output of plain onnxruntime, which knows only the bodies of the functions."""
    return np.asarray(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0])


def on_target(path: Path, feed: Feed, folder: Path) -> list[np.ndarray]:
    """Outputs of the compiled file, whose sparse ops all run in the native library: tokens at once, and one by one.

    Kernels go other ways for one token than for many.
    """
    api.compile(path, folder / "artifact", target="ort-cpu")
    domains = {n.domain for n in ir.load(folder / "artifact" / "model.onnx").graph}
    assert domains == {"", native.DOMAIN}
    target = OrtCpu()
    session = target.load(target.open(folder / "artifact"), threads=2)
    parts = [session.run({"x": feed["x"][..., i : i + 1, :]}) for i in range(TOKENS)]
    outputs = [next(iter(found.values())) for found in (session.run(feed), *parts)]
    return [outputs[0], np.concatenate(outputs[1:], axis=-2)]


def error(found: np.ndarray, want: np.ndarray) -> float:
    assert found.shape == want.shape
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def allowed(method: str, storage: str, form: str, path: Path) -> float:
    """How far the kernels may be off by rounding, as a share of the norm of the output."""
    if storage == "keep":
        return FLOAT
    if method != "teal":
        return math.hypot(DOTS, ROWS) if form == "gated" and method != "topk" else ROWS
    # Before the last product there were others, rounded as well; a value that they move over its threshold is dropped
    # here and kept there. Those within a standard deviation of the threshold count as moved.
    before = SLOPE * ROWS * (math.sqrt(2) if form == "gated" else 1.0)
    written = ir.load(path)
    down = next(n for n in written.graph if n.name == "down")
    source, limit = down.inputs[0], down.inputs[-1].const_value.numpy()
    (h,) = reference_runner(written, [source.name])(feeds(form)[4]).values()
    close = np.abs(np.abs(h) - limit) <= before * np.sqrt(np.mean(np.square(h)))
    moved = np.square(h[close]).sum() / np.square(h[np.abs(h) > limit]).sum()
    return math.sqrt(before**2 + ROWS**2 + moved)


cases = [
    pytest.mark.parametrize("form", FORMS),
    pytest.mark.parametrize("storage", STORAGES),
    pytest.mark.parametrize("method", METHODS),
]


def every_case(test):
    for mark in cases:
        test = mark(test)
    return test


@every_case
def test_evaluator_and_stock_runtime(method, storage, form, written):
    path = written(method, storage, form)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {f.domain for f in proto.functions} == {DOMAIN}
    assert native.DOMAIN not in {o.domain for o in proto.opset_import}
    feed = feeds(form)[4]
    found = stock(path, feed)
    assert error(found, ReferenceEvaluator(proto).run(None, feed)[0]) <= FLOAT
    (dense,) = reference_runner(original := model(form), [original.graph.outputs[0].name])(feed).values()
    assert error(found, dense) > 0.01, "nothing was dropped"


@needs_library
@every_case
def test_kernels_of_the_target(method, storage, form, written, tmp_path):
    path, feed = written(method, storage, form), feeds(form)[4]
    want, most = stock(path, feed), allowed(method, storage, form, path)
    for found in on_target(path, feed, tmp_path):
        assert error(found, want) <= most


@needs_library
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("method", METHODS)
def test_kernels_that_do_not_round(method, storage, form, written, tmp_path):
    changed, feed = ir.load(written(method, storage, form)), feeds(form)[4]
    for node in changed.graph:
        if node.domain == DOMAIN:
            node.attributes["exact"] = ir.AttrInt64("exact", 1)
    path = tmp_path / "exact.onnx"
    ir.save(changed, path)
    want = stock(path, feed)
    for found in on_target(path, feed, tmp_path):
        assert error(found, want) <= FLOAT


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M: its file, feeds of real text to calibrate with, and one to compare on."""
    from examples.llm.gguf import GgufFile
    from examples.llm.model import Config, build, smollm2_weights
    from examples.llm.tokenizer import Tokenizer
    from examples.relu.text import bible

    source = GgufFile(smollm2_weights())
    config, text = Config.read(source), bible()
    path = tmp_path_factory.mktemp("smollm2") / "model.onnx"
    ir.save(build(source), path)
    empty = np.zeros((1, config.kv_heads, 0, config.head_size), np.float32)
    cache = {f"past_{kind}.{i}": empty for i in range(config.layers) for kind in ("key", "value")}
    found = []
    for numbers in (text.calibration, text.held_out):
        tokens = Tokenizer(source).encode("".join(text.characters[i] for i in numbers[:4000]))
        found += [{"input_ids": np.array([tokens[i : i + 64]], np.int64), **cache} for i in range(0, 256, 64)]
    return path, found[:4], found[4]


def three_logits(smollm2, step: Threshold, folder: Path) -> list[np.ndarray]:
    """Logits of the original and of the portable file in plain onnxruntime, and of the latter on the target."""
    original, data, feed = smollm2
    path, artifact = folder / "portable.onnx", folder / "artifact"
    write_portable(original, step, data, path)
    found = []
    for file in (original, path):
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found.append(session.run(["logits"], feed)[0][0])
    api.compile(path, artifact, target="ort-cpu")
    domains = [n.domain for n in ir.load(artifact / "model.onnx").graph]
    assert domains.count(native.DOMAIN) == (210 if step.method == "teal" else 30)
    assert DOMAIN not in domains
    target = OrtCpu()
    return [*found, target.load(target.open(artifact), threads=2).run(feed)["logits"][0]]


# Where only zeros are dropped, float kernels differ in the last bits. Else these bits decide about a few values near a
# threshold, and 30 layers multiply what comes of it; still it is less than what the method itself costs.
@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(
    ("method", "storage", "share", "least", "agreement"),
    [
        ("cats", "keep", 0.0, 100.0, 1.0),  # measured: 114.7 dB, 1.000
        ("cats", "keep", 0.3, 25.0, 0.9),  # 29.5 dB, 0.953
        ("cats", "int8", 0.0, 30.0, 0.9),  # 37.4 dB, 0.984
        ("chess", "int8", 0.3, 18.0, 0.75),  # 24.2 dB, 0.922
        ("topk", "int4", 0.3, 22.0, 0.9),  # 32.3 dB, 0.984
        ("teal", "keep", 0.2, 18.0, 0.85),  # 25.0 dB, 0.906
    ],
)
def test_language_model(method, storage, share, least, agreement, smollm2, tmp_path):
    step = Threshold(method=method, sparsity=share, weights=storage, only_if_faster=False)
    dense, want, found = three_logits(smollm2, step, tmp_path)
    assert sqnr(want, found) >= least
    assert np.mean(found.argmax(axis=-1) == want.argmax(axis=-1)) >= agreement
    if share:
        assert sqnr(want, found) > sqnr(dense, want)
