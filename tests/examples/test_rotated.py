"""The grid of QuEST in the example on rotations."""

from __future__ import annotations

import numpy as np
import pytest

from examples.llm.rotated import gaussian_clip, quest_error, search_error


@pytest.mark.parametrize(("bits", "clip"), [(1, 0.79788), (2, 1.49353), (3, 2.05107), (4, 2.5140)])
def test_clip_is_that_of_uniform_quantizers(bits, clip):
    """Max, "Quantizing for minimum distortion", 1960: half the levels times the published step."""
    assert gaussian_clip(bits) == pytest.approx(clip, abs=2e-4)


def test_error_of_blocks_is_that_of_a_gaussian():
    """0.01154 at 4 bits, whatever the weights were; a grid with zero has one step less to spread."""
    weight = np.random.default_rng(0).laplace(size=(512, 96)).astype(np.float32)
    assert quest_error(weight, 4) == pytest.approx(0.01154, rel=0.03)
    assert search_error(weight, 4) > 0.015
