"""CoreInfer in the loop: dense with all neurons, checks for drift, clusters, and the scores of the example."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from examples.llm.core_infer import Score, prompts, read, windows, write_graphs
from examples.llm.generate import BoundModel, CoreInfer, Dense
from examples.llm.gguf import GgufFile
from examples.llm.model import build, smollm2_weights
from examples.llm.session import wikitext
from examples.llm.tokenizer import Tokenizer
from onnxcomp.model import save
from onnxcomp.passes.core_neurons import CoreNeurons

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 3, 32, 2, 80, 120
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, 60).tolist()
PROMPT, REST = TOKENS[:40], TOKENS[40:]


class Weights:
    """Stands for a GGUF file of a small Llama."""

    metadata: ClassVar[dict[str, Any]] = {
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def tensor(self, name: str) -> np.ndarray:
        if "norm" in name:
            return self._random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        kind = name.removesuffix(".weight").split(".")[-1]
        rows = {"token_embd": VOCABULARY, "ffn_gate": HIDDEN, "ffn_up": HIDDEN}.get(kind, WIDTH)
        columns = HIDDEN if kind == "ffn_down" else WIDTH
        return (2 * self._random.normal(size=(rows, columns)) / np.sqrt(columns)).astype(np.float32)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("core") / "dense.onnx"
    stand_in: Any = Weights()
    save(build(stand_in), path)
    return path


@pytest.fixture(scope="module")
def expected(model_path) -> np.ndarray:
    return steps(Dense(BoundModel(model_path)))


@pytest.fixture(scope="module")
def folders(model_path, tmp_path_factory) -> dict[float, Path]:
    """Graphs that keep all neurons, and a third."""
    found = {keep: tmp_path_factory.mktemp("graphs") for keep in (1.0, 0.3)}
    for keep, folder in found.items():
        write_graphs(model_path, folder, CoreNeurons(keep=keep, skip_layers=1))
    return found


def steps(writer) -> np.ndarray:
    return np.stack([writer.start(PROMPT), *(writer.step(token) for token in REST)])


def close(found: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_all_neurons(folders, expected):
    writer = CoreInfer.load(folders[1.0])
    close(steps(writer), expected)
    assert (writer.chosen, writer.overlaps) == (1, [])
    close(steps(writer), expected)


def test_some_neurons(folders, expected):
    """The prompt is dense, the answer is not, and the choice depends on the prompt alone."""
    writer = CoreInfer.load(folders[0.3])
    first = steps(writer)
    close(first[:1], expected[:1])
    assert np.abs(first[1:] - expected[1:]).max() > 1e-3 * np.abs(expected).max()
    writer.start(PROMPT[::-1])
    writer.step(0)
    np.testing.assert_array_equal(steps(writer), first)


def test_checks_see_what_a_token_uses(folders):
    """Every fifth token goes through the dense model; with all neurons in use none is missing."""
    writer = CoreInfer.load(folders[1.0], check=5, least=0.5)
    steps(writer)
    assert writer.overlaps == [1.0] * 4
    assert writer.chosen == 1
    writer = CoreInfer.load(folders[0.3], check=5, least=-9.0)
    steps(writer)
    assert len(writer.overlaps) == 4
    # Against sets, by another run of the dense graph: the tokens that chose are at 1, and chance is at 0.
    dense = BoundModel(folders[0.3] / "prefill.onnx")

    def share(tokens: list[int]) -> float:
        outputs, _ = dense.read(tokens, dense.empty_cache())
        index = {n: i.tolist() for n, i in writer._index.items()}
        counts = {n: outputs[f"core_count.{n}"].numpy() for n in index}
        return float(np.mean([sum(counts[n][index[n]]) / sum(counts[n]) for n in index]))

    outputs, _ = dense.read([PROMPT[0]], dense.empty_cache())
    kept = round(0.3 * HIDDEN) / HIDDEN
    want = (share([PROMPT[0]]) - kept) / (share(PROMPT) - kept)
    assert writer._overlap(outputs) == pytest.approx(want, abs=1e-6)
    assert writer._overlap(dense.read(PROMPT, dense.empty_cache())[0]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("window", [8, 30, 1000])
def test_neurons_are_chosen_anew(window, folders, expected):
    """Reading the last tokens again gives the same cache, and neurons that these tokens use."""
    close(steps(CoreInfer.load(folders[1.0], check=6, least=9.0, window=window)), expected)
    writer = CoreInfer.load(folders[0.3], check=6, least=9.0, window=window)
    steps(writer)
    assert writer.chosen == 4
    dense = BoundModel(folders[0.3] / "prefill.onnx")
    with_six = PROMPT + REST[:6]
    writer.start(PROMPT)
    for token in REST[:6]:
        writer.step(token)
    cache = dense.empty_cache()
    if window < len(with_six):
        _, cache = dense.read(with_six[:-window], cache)
    again = CoreInfer.load(folders[0.3])
    again.start(PROMPT)
    outputs, again._cache = dense.read(with_six[-window:], cache)
    again._choose(outputs)
    if window == 1000:  # all of the cache is dense anew; a part of it was written by few neurons otherwise
        np.testing.assert_allclose(writer.step(REST[6]), again.step(REST[6]), rtol=0, atol=1e-4)
    for layer, index in again._index.items():
        assert len(np.intersect1d(index, writer._index[layer])) > 0.8 * len(index)


def test_clusters(model_path, tmp_path):
    """Prompts of one cluster share neurons, whose weights are taken once."""
    random = np.random.default_rng(1)
    data = prompts(BoundModel(model_path), [random.integers(0, VOCABULARY, 30) for _ in range(8)])
    write_graphs(model_path, tmp_path, CoreNeurons(keep=0.4, skip_layers=0, clusters=2), data)
    writer = CoreInfer.load(tmp_path)
    run, taken = writer.gather.run, []
    writer.gather.run = lambda values: taken.append(1) or run(values)
    found = []
    for feed in data:
        writer.start(feed["input_ids"][0].tolist())
        writer.step(0)
        found.append(np.concatenate(list(writer._index.values())))
    assert len(np.unique(found, axis=0)) == len(writer._of_cluster) == len(taken) == 2
    assert writer.chosen == 1


def test_scores(folders, model_path, expected):
    """Log-likelihoods are those of the dense model if all neurons are kept."""
    score, core = Score(), Score()
    read(Dense(BoundModel(model_path)), PROMPT, REST, score)
    read(CoreInfer.load(folders[1.0]), PROMPT, REST, core)
    wide = expected[1:-1].astype(np.float64)
    want = wide[np.arange(len(REST) - 1), REST[1:]] - np.logaddexp.reduce(wide, axis=-1)
    np.testing.assert_allclose(score.likely, want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(core.likely, want, rtol=0, atol=1e-3)
    assert score.perplexity == pytest.approx(np.exp(-np.mean(want)), rel=1e-4)
    assert len(core.steps) == len(REST) - 1
    assert core.choice[0] > 0
    assert score.choice == [0.0]


def test_windows():
    assert windows(range(10), 3, 4) == [range(4), range(3, 7), range(6, 10)]
    with pytest.raises(ValueError, match="no window of 11"):
        windows(range(10), 1, 11)


def test_no_block_left(model_path, tmp_path):
    with pytest.raises(SystemExit, match="no block has neurons"):
        write_graphs(model_path, tmp_path, CoreNeurons(skip_layers=9))


@pytest.mark.slow
def test_smollm2(tmp_path):
    """All neurons of the real model give its perplexity; fewer give a worse one that is no accident."""
    if not wikitext().is_file():
        pytest.skip("there is no text of WikiText-2")
    file = GgufFile(smollm2_weights())
    save(build(file), tmp_path / "dense.onnx")
    text = windows(Tokenizer(file).encode(wikitext().read_text(encoding="utf-8")), 1, 280)[0]
    found = {}
    for keep in (1.0, 0.6):
        write_graphs(tmp_path / "dense.onnx", tmp_path / str(keep), CoreNeurons(keep=keep))
        score = Score()
        read(CoreInfer.load(tmp_path / str(keep), threads=2), text[:240], text[240:], score)
        found[keep] = score.perplexity
    dense = Score()
    read(Dense(BoundModel(tmp_path / "dense.onnx", threads=2)), text[:240], text[240:], dense)
    assert found[1.0] == pytest.approx(dense.perplexity, rel=1e-3)
    assert dense.perplexity < found[0.6] < 20 * dense.perplexity
