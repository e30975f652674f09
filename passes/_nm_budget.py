"""Which layers are made sparse where not all may be: those whose outputs lose least."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxcomp.passes._nm_inputs import Moments
from onnxcomp.passes._nm_scores import Method, Pattern, score_of, scores_of
from onnxcomp.passes._nm_weights import Layer


def loss(layer: Layer, moments: Moments | None, method: Method, pattern: Pattern) -> float:
    """Share of the power of a layer's output that its mask takes, 0 to 1, as if no two inputs were correlated.

    Args:
        layer: The layer.
        moments: Of its inputs; if None, all count alike.
        method: What chooses the mask; `sparsegpt` counts as `wanda`.
        pattern: Of the mask.
    """
    weight = layer.read().weight
    squares = None if moments is None else moments.squares
    mask = pattern.choose(scores_of(score_of(method), weight, squares), np.abs(weight))
    power = weight**2 if squares is None else weight**2 * squares[:, None, :]
    whole = float(power.sum())
    return float(power[~mask].sum()) / whole if whole else 0.0


def affordable(losses: Mapping[Layer, float], share: float) -> set[Layer]:
    """Layers that lose least, as many as together have at most a share of all weights."""
    sizes = {layer: float(np.prod(layer.shape)) for layer in losses}
    left = share * sum(sizes.values()) * (1 + 1e-9)
    chosen: set[Layer] = set()
    for layer in sorted(losses, key=lambda found: losses[found]):
        if sizes[layer] <= left:
            chosen.add(layer)
            left -= sizes[layer]
    return chosen
