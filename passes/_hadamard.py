"""Orthogonal matrices that spread one channel over all of them, and the grid that suits what they leave: Gaussians."""

from __future__ import annotations

import math

import numpy as np

from onnxcomp.target import Array


def hadamard(size: int) -> Array:
    """Orthogonal float64 matrix `(size, size)` whose entries are as flat as possible.

    A Hadamard matrix, +-1 / sqrt(size), where size is a power of two times the order of one of Paley's (12, 20, 24, 28,
    36, 44, ...), e.g. 384, 576, 768. Otherwise what remains of the size after powers of two is a Hartley matrix, whose
    entries are at most sqrt(2) times as large.
    """
    power, odd = size & -size, size // (size & -size)
    factor = np.ones((1, 1))
    if odd > 1:
        orders = [odd << k for k in range(2, power.bit_length())]
        found = next((m for order in orders if (m := _paley(order)) is not None), None)
        factor = _hartley(odd) if found is None else found / math.sqrt(len(found))
    while len(factor) < size:
        factor = np.block([[factor, factor], [factor, -factor]]) / math.sqrt(2)
    return factor


def rotation(size: int, seed: int, *, keeps_mean: bool = False) -> Array:
    """Random rotation of rows `x @ Q`: random signs, then Hadamard; float64 `(size, size)`.

    Args:
        size: Number of channels.
        seed: Of the signs.
        keeps_mean: Q leaves the vector of ones where it is, and with it the mean and the variance of a row, so that
            LayerNorm commutes with Q. A reflection sees to that; it moves entries by some 1 / size.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size)
    turned = signs[:, None] * hadamard(size)
    if not keeps_mean:
        return turned
    even = np.full(size, size**-0.5)
    mirror = even @ turned - even
    length = float(mirror @ mirror)
    return turned if length < 1e-20 else turned - np.outer(turned @ mirror, mirror) * (2.0 / length)


def rotate(array: Array, axis: int, matrix: Array, gain: Array | None, window: tuple[int, int] | None) -> Array:
    """Turns every block of channels along `axis`: `block -> (block * gain) @ matrix`, in float64; keeps the dtype.

    Args:
        array: Weights; `axis` has a multiple of `len(matrix)` channels.
        axis: The channels.
        matrix: Rotation of one block.
        gain: One factor a channel, or None.
        window: First and behind-last channel that are turned; all if None.
    """
    rows = np.moveaxis(array, axis, -1)
    turned = np.array(rows)
    first, last = (0, rows.shape[-1]) if window is None else window
    flat = turned.reshape(-1, rows.shape[-1])
    for start in range(0, len(flat), 4096):  # a large table is never held in float64
        part = flat[start : start + 4096, first:last].astype(np.float64)
        part = part if gain is None else part * gain[first:last]
        flat[start : start + 4096, first:last] = (part.reshape(-1, len(matrix)) @ matrix).reshape(part.shape)
    return np.ascontiguousarray(np.moveaxis(flat.reshape(rows.shape), -1, axis))


def _paley(order: int) -> Array | None:
    """Hadamard matrix of +-1 by Paley's constructions over a prime field, or None."""
    if order % 4 == 0 and _is_prime(order - 1):
        skew = _conference(order - 1, -1)
        return skew + np.eye(order)
    prime = order // 2 - 1
    if order % 4 == 0 and prime % 4 == 1 and _is_prime(prime):
        return np.kron(_conference(prime, 1), [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])
    return None


def _conference(prime: int, sign: int) -> Array:
    """Matrix of 0 on and +-1 off the diagonal with orthogonal rows, symmetric or (sign = -1) skew."""
    character = -np.ones(prime)
    character[np.arange(prime) ** 2 % prime] = 1
    character[0] = 0
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    return matrix


def _hartley(size: int) -> Array:
    angle = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return (np.cos(angle) + np.sin(angle)) / math.sqrt(size)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
