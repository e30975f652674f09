"""The OCR example: exact labels, disjoint words, and the accuracy of the float model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from examples.assets import ocr_model
from examples.ocr.words import HEIGHT, WIDTH, calibration, decode, evaluation, samples
from onnxcomp.api import compare, rewrite
from onnxcomp.model import load
from onnxcomp.targets.ort import reference_runner


def test_words_of_calibration_and_evaluation_differ():
    first, second = ({word.lower() for _, word in samples(200, seed=s, part=s)} for s in (0, 1))
    assert len(first) > 100
    assert not first & second


def test_the_same_seed_gives_the_same_pictures():
    for a, b in zip(itertools.islice(calibration(), 3), itertools.islice(calibration(), 3), strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])


@pytest.fixture(scope="module")
def model_path():
    return ocr_model()


def test_decode_merges_repeats_and_drops_blanks(model_path):
    scores = np.zeros((5, 6625))
    for step, index in enumerate([0, 5, 5, 0, 5]):
        scores[step, index] = 1.0
    text = decode(scores)
    assert len(text) == 2
    assert text[0] == text[1]


def test_float_accuracy(model_path):
    from examples.ocr.words import _feed

    model = load(model_path)
    run = reference_runner(model, [model.graph.outputs[0].name])
    pairs = [(decode(next(iter(run(_feed(image)).values()))[0]), word) for image, word in samples(60, seed=3, part=0)]
    assert sum(read == word for read, word in pairs) >= 57, [p for p in pairs if p[0] != p[1]]


def test_int8_keeps_close(model_path, tmp_path):
    """A real model whose ranges have to be found well: poorly chosen ones cost 5 dB and every fifteenth word."""
    shapes = {"x": (1, 3, HEIGHT, WIDTH)}
    rewrite(model_path, tmp_path / "int8.onnx", recipe="int8", data=calibration, shapes=shapes)
    unseen = list(itertools.islice(evaluation(), 60))
    found = compare(model_path, tmp_path / "int8.onnx", data=unseen, shapes=shapes, layers=False)
    assert found.outputs[0].sqnr > 15.0
