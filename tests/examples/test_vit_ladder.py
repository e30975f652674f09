"""The ladder of the vision transformer: what its rungs are, which pictures a seed draws, what the table says."""

from __future__ import annotations

import argparse
import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"examples.{name}")


@pytest.fixture
def ladder(example):
    pytest.importorskip("torch", reason="needs PyTorch")
    return example("vit.ladder")


def test_rungs_add_up(ladder):
    kinds = [[type(p).name for p in passes] for passes in ladder.rungs(4, 8).values()]
    assert kinds == [
        ["quantize", "quantize"],
        ["smooth", "quantize", "quantize"],
        ["smooth", "quantize", "quantize", "noisy_bias"],
        ["smooth", "quantize", "quantize", "noisy_bias"],
        ["smooth", "quantize", "quantize", "noisy_bias", "reconstruct"],
    ]
    quantizers = [[p for p in passes if p.name == "quantize"] for passes in ladder.rungs(4, 8).values()]
    assert [[q.bias_correction for q in both] for both in quantizers] == [[False] * 2] * 3 + [[True] * 2] * 2
    assert {tuple((q.weight_bits, q.activation_bits) for q in both) for both in quantizers} == {((8, 8), (4, 8))}


def test_the_recipe_keeps_both_ends_at_8_bits(ladder):
    *_, between, ends = ladder.load_recipe("w6a6").passes
    assert (between.weight_bits, between.activation_bits) == (6, 6)
    assert (ends.weight_bits, ends.activation_bits) == (8, 8)


@pytest.mark.parametrize("text", ["w6", "a8w4", "w9a8", "w4a8 ", "w4a16"])
def test_bits_are_checked(ladder, text):
    assert ladder.bits("w4a8") == (4, 8)
    with pytest.raises(argparse.ArgumentTypeError, match="w4a8"):
        ladder.bits(text)


def test_the_table_names_rungs_that_fall_short(ladder, capsys):
    ladder._print("w4a8", {"RepQ": [(5.0, 0.5), (7.0, 0.7)], "+ noisy bias": [(5.0, 0.6)], "+ more": [(9.0, 0.8)]})
    lines = capsys.readouterr().out.splitlines()
    assert "6.00 ( 1.00)    0.600 (0.100)" in lines[3]
    assert [("worse" in line) for line in lines[3:]] == [False, True, False]


def test_a_seed_draws_pictures(example, monkeypatch, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
    path = tmp_path / "pictures.npz"
    np.savez(path, train_images=pictures, test_images=pictures[:3], test_labels=np.arange(3))
    monkeypatch.setenv("ONNXCOMP_CIFAR", str(path))
    data = example("vit.data")
    first, again, other = ([f["image"].tobytes() for f in data.draw(8, seed)] for seed in (0, 0, 1))
    assert first == again
    assert len(set(first)) == 8
    assert set(first) != set(other)
    assert [f["image"].shape for f in itertools.islice(data.test_pictures(2), 3)] == [(1, 3, 224, 224)] * 2
    np.testing.assert_array_equal(data.labels(), np.arange(3))
