"""The ReLU example: a training of seconds on the real text, and what the toolkit finds in the result."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from onnxcomp import api
from onnxcomp.model import model_size
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.prune_dead import PruneDead
from onnxcomp.passes.threshold import Threshold

pytest.importorskip("torch", reason="needs PyTorch")

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example():
    """Imports a module of the example, which is found from the checkout's folder only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield lambda name: importlib.import_module(f"examples.relu.{name}")


def trained(example, config, characters, cache):
    """The text comes from the usual cache, the model goes to one of its own."""
    text = example("text").bible()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXCOMP_CACHE", str(cache))
        return example("__main__").Study(config, text, characters)


@pytest.fixture(scope="module")
def study(example, tmp_path_factory):
    config = example("model").Config(
        width=32, hidden=128, layers=2, heads=2, context=64, steps=120, batch=8, rate=5e-3, l1=0.03, threads=1
    )
    return trained(example, config, 4096, tmp_path_factory.mktemp("cache"))


def activity(study):
    return api.sparsity(study.path, data=study.calibration, samples=None, measure=False).layers


def cost(study, method, share):
    """Loss above that of the dense model."""
    step = Threshold(method=method, sparsity=share, only_if_faster=False)
    return study.loss(study.rewritten(step)[0]) - study.dense


def test_parts_of_a_text(example):
    letters = np.arange(40 * 8192) // 8192 % 16
    text = example("text").split("".join(map(chr, letters + ord("a"))))
    assert {text.characters[i] for i in text.calibration} == {"i"}
    assert {text.characters[i] for i in text.held_out} == {"p"}
    assert {text.characters[i] for i in text.training} == set("abcdefghjklmno")
    assert len(text.training) + len(text.calibration) + len(text.held_out) == len(letters)


def test_the_penalty_rises_along_a_sine(example):
    config = example("model").Config(steps=400, l1=2.0)
    assert [config.penalty(s) for s in (0, 100, 300, 400)] == [0.0, 0.0, 2.0, 2.0]
    assert config.penalty(200) == pytest.approx(1.0)
    assert config.penalty(150) == pytest.approx(2.0 * (1.0 - 0.5**0.5) / 2.0)


def test_it_learned_something(study):
    """More than how often each character comes, which is worth 3.03 nats of loss on the held-out text."""
    assert 3.0 < study.text.unigram_loss() < 3.06
    assert study.dense < study.text.unigram_loss() - 0.3


def test_most_neurons_are_silent(study):
    """About half are before training."""
    layers = activity(study)
    assert [(layer.activation, layer.gated) for layer in layers] == [("relu", True)] * 2
    assert all(layer.natural.mean < 0.2 for layer in layers)


def test_small_values_go_first(study):
    """Zeros cost nothing; the more is dropped, the more it costs, but for noise."""
    losses = [cost(study, "fatrelu", share) for share in (0.0, 0.95, 0.98, 0.99)]
    assert abs(losses[0]) < 1e-5
    assert all(a <= b + 1e-3 for a, b in pairwise(losses))
    assert 1e-3 < losses[-1] < 1.0


def test_dead_neurons_go_and_outputs_on_calibration_data_stay(study):
    dead = sum(layer.dead for layer in activity(study))
    model, said = study.rewritten(PruneDead())
    assert sum(int(text.split()[0]) for text in said) == dead > 0
    before = model_size(study.rewritten(Cleanup())[0]).parameters
    assert before - model_size(model).parameters == dead * 3 * study.config.width
    assert study.difference(model, study.calibration)[0] < 1e-5
    # Some neurons that were silent for all of the few calibration characters do fire now and then.
    assert abs(study.loss(model) - study.dense) < 2e-3


@pytest.mark.slow
def test_the_real_training(example, tmp_path):
    """Minutes of training with the penalty. It measured: loss 1.262, silent 96 to 99 %, 126 dead neurons."""
    study = trained(example, example("model").Config(l1=0.005), 32768, tmp_path)
    assert study.dense < 1.35
    assert all(layer.natural.mean < 0.06 for layer in activity(study))
    for method, share, most in (("fatrelu", 0.9, 1e-4), ("fatrelu", 0.98, 0.03), ("topk", 0.95, 0.01)):
        assert abs(cost(study, method, share)) < most
    windows = example("__main__").windows
    model, said = study.rewritten(PruneDead(), list(windows(study.text.calibration, study.config.context)))
    assert sum(int(text.split()[0]) for text in said) > 30
    assert study.difference(model, study.calibration)[0] < 1e-5
    most, changed = study.difference(model, windows(study.held_out, study.config.context))
    assert most < 0.02
    assert changed < 0.01
