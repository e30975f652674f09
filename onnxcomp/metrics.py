"""Distances between a reference tensor and an approximation of it."""

from __future__ import annotations

import numpy as np

from onnxcomp.target import Array

EXACT_DB = 200.0
"""SQNR reported for an exact result, in dB; beyond what float32 can tell apart."""


def sqnr(reference: Array, other: Array) -> float:
    """Signal to quantization noise ratio in dB, `10 log10(sum(r**2) / sum((r - o)**2))`, at most `EXACT_DB`.

    Args:
        reference: Any shape, real.
        other: Same shape.
    """
    return sqnr_of_sums(*power_sums(reference, other))


def power_sums(reference: Array, other: Array) -> tuple[float, float]:
    """Signal power and noise power, each summed over all elements, so that sums over batches can be added up."""
    r, o = reference.astype(np.float64), other.astype(np.float64)
    return float((r**2).sum()), float(((r - o) ** 2).sum())


def sqnr_of_sums(signal: float, noise: float) -> float:
    """SQNR in dB from summed powers; `EXACT_DB` without noise, `-EXACT_DB` for noise without signal."""
    if noise == 0.0:
        return EXACT_DB
    if signal == 0.0 or not np.isfinite(noise):
        return -EXACT_DB
    return float(np.clip(10.0 * np.log10(signal / noise), -EXACT_DB, EXACT_DB))


def cosine(reference: Array, other: Array) -> float:
    """Cosine of the angle between the flattened tensors; 1 if both are zero."""
    r, o = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norm = float(np.linalg.norm(r) * np.linalg.norm(o))
    if norm == 0.0:
        return 1.0 if np.array_equal(r, o) else 0.0
    return float(r @ o) / norm


def top1_agreement(reference: Array, other: Array) -> float:
    """Share of positions at which the largest entry along the last axis is the same one."""
    return float((reference.argmax(axis=-1) == other.argmax(axis=-1)).mean())


def kl_divergence(reference: Array, other: Array) -> float:
    """Mean over positions of `KL(p || q)` in nats.

    Rows along the last axis that are probabilities already (non-negative, sum 1) are taken as they are; otherwise
    they are taken as logits.
    """
    r, o = reference.astype(np.float64), other.astype(np.float64)
    is_probability = bool((r >= 0).all() and np.allclose(r.sum(axis=-1), 1.0, atol=1e-3))
    p, q = (_normalised(r), _normalised(o)) if is_probability else (_log_softmax(r), _log_softmax(o))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _normalised(x: Array) -> Array:
    x = np.maximum(x, 1e-12)
    return np.asarray(np.log(x / x.sum(axis=-1, keepdims=True)))


def _log_softmax(x: Array) -> Array:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))
