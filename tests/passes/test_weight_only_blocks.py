"""Packing and the search for scales, against loops over single blocks."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp import blockwise
from onnxcomp.blockwise import pack, quantize_blocks, unpack

METHODS = ("rtn", "mse", "hqq")


def matrix(rows: int = 5, columns: int = 96, dtype: type = np.float32) -> np.ndarray:
    random = np.random.default_rng(3)
    weight = random.normal(size=(rows, columns)) * random.uniform(0.5, 2.0, size=(rows, 1))
    weight[1, 7] = 9.0  # an outlier
    return (weight * 0.05).astype(dtype)


def test_low_bits_come_first():
    assert pack(np.array([1, 2, 15], np.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(np.array([1, 2, 3, 0, 1], np.uint8), 2).tolist() == [0b00111001, 1]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [8, 9, 11])
def test_packing_equals_a_sum_of_powers(bits, count):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, count)).astype(np.uint8)
    packed = pack(codes, bits)
    each = 8 // bits
    for row, data in zip(codes, packed, strict=True):
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        assert int.from_bytes(data.tobytes(), "little") == number
        assert len(data) == -(-count // each)
    np.testing.assert_array_equal(unpack(packed, bits)[:, :count], codes)


def round_to_nearest(block: np.ndarray, bits: int, symmetric: bool) -> tuple[np.float32, int, list[int]]:
    """One block by the definition, element by element, as float32 throughout."""
    top = 2**bits - 1
    low, high = block.min(), block.max()
    if symmetric:
        zero = 2 ** (bits - 1)
        scale = (high if high > -low else low) / np.float32(-zero)
    else:
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
        scale = (high - low) / np.float32(top)
        zero = int(np.clip(np.rint(-low / scale), 0, top))
    inverse = np.float32(1) / scale
    return scale, zero, [int(np.clip(np.rint(w * inverse) + zero, 0, top)) for w in block]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_round_to_nearest_equals_the_definition(bits, symmetric):
    weight = matrix()
    found = quantize_blocks(weight, bits, 32, symmetric=symmetric, method="rtn")
    codes = found.integers().reshape(5, 3, 32)
    for place in np.ndindex(5, 3):
        scale, zero, expected = round_to_nearest(weight.reshape(5, 3, 32)[place], bits, symmetric)
        assert found.scale[place] == scale
        assert codes[place].tolist() == expected
        assert zero == (2 ** (bits - 1) if found.zero_point is None else found.zero_point[place])
    assert (found.zero_point is None) == symmetric


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_values_lie_within_a_step(method, bits, symmetric, dtype):
    """Of what is stored, the scale in its own type included; a search may clip more, but never with a worse error."""
    weight = matrix(dtype=dtype)
    found = quantize_blocks(weight, bits, 32, symmetric=symmetric, method=method)
    assert found.scale.dtype == dtype
    steps = np.abs(np.repeat(found.scale.astype(np.float32), 32, axis=1))
    error = found.dequantize() - weight.astype(np.float32)
    if method == "rtn":
        assert (np.abs(error) <= 1.02 * steps).all()
    relative = np.linalg.norm(error) / np.linalg.norm(weight.astype(np.float32))
    assert found.error == pytest.approx(relative, rel=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("method", "norm"), [("mse", 2.0), ("hqq", 0.7)])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_search_lowers_its_norm_in_every_block(method, norm, bits, symmetric):
    weight = matrix(40, 128)

    def errors(method: str) -> np.ndarray:
        found = quantize_blocks(weight, bits, 32, symmetric=symmetric, method=method)
        return (np.abs(found.dequantize() - weight) ** norm).reshape(40, 4, 32).sum(axis=-1)

    before, after = errors("rtn"), errors(method)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize("method", METHODS)
def test_weights_on_a_grid_come_back(method):
    random = np.random.default_rng(1)
    codes = random.integers(0, 16, (6, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = ((codes - 5) * np.float32(0.25)).astype(np.float32)
    found = quantize_blocks(weight, 4, 32, symmetric=False, method=method)
    np.testing.assert_array_equal(found.integers(), codes)
    np.testing.assert_allclose(found.dequantize(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_odd_blocks_stay_finite(method, symmetric, dtype):
    """All zero, constant, of one sign, tiny, huge."""
    info = np.finfo(dtype)
    random = np.random.default_rng(2)
    weight = np.zeros((6, 32), np.float64)
    weight[1], weight[2], weight[3] = 1.5, random.uniform(1, 2, 32), -random.uniform(1, 2, 32)
    weight[4], weight[5] = random.normal(size=32) * float(info.tiny), random.uniform(-0.4, 0.4, 32) * float(info.max)
    weight = weight.astype(dtype)
    found = quantize_blocks(weight, 4, 32, symmetric=symmetric, method=method)
    values = found.dequantize()
    assert np.isfinite(values).all()
    assert (values[0] == 0).all()
    exact = weight.astype(np.float64)
    bound = np.abs(exact).max(axis=1) * 0.15 + max(16 * float(info.smallest_subnormal), 1e-29)
    assert (np.abs(values - exact).max(axis=1) <= bound).all()


def test_padding_has_no_part_in_it():
    weight = matrix(4, 80)
    found = quantize_blocks(weight, 4, 32, symmetric=False, method="mse")
    assert found.codes.shape == (4, 3, 16)
    assert found.dequantize().shape == (4, 80)
    alone = quantize_blocks(weight[:, :64], 4, 32, symmetric=False, method="mse")
    np.testing.assert_array_equal(found.codes[:, :2], alone.codes)
    tail = unpack(found.codes[:, 2], 4)[:, 16:]
    np.testing.assert_array_equal(tail, np.repeat(found.zero_point[:, 2:], 16, axis=1))


@pytest.mark.parametrize("method", METHODS)
def test_slabs_do_not_show(method, monkeypatch):
    weight = matrix(33, 64)
    whole = quantize_blocks(weight, 4, 32, symmetric=False, method=method)
    monkeypatch.setattr(blockwise, "_SLAB", 64 * 5)
    parts = quantize_blocks(np.ascontiguousarray(weight.T).T, 4, 32, symmetric=False, method=method)
    for name in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
