"""Sample data that does not fit, is damaged, or is not there."""

import zipfile

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from samples import X, firsts, spec

from onnxcomp.data import check_feed, load_data
from onnxcomp.errors import DataError


@pytest.mark.parametrize(
    ("given_spec", "message"), [(spec(shape=None), "no known rank"), (spec(dtype=object), "is object")]
)
def test_random_that_cannot_be(given_spec, message):
    with pytest.raises(DataError, match=message):
        next(iter(load_data("random", (given_spec,))))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((3, 8), np.float32)}, r"no input 'y'; its inputs are \['x'\]"),
        ({"x": np.zeros((3, 8), np.float32), "label": np.zeros(3)}, "no input 'label'"),
        ({"x": np.zeros((3, 8))}, "sample 0: input 'x' is float64; the model expects float32"),
        ({"x": np.zeros((3, 9), np.float32)}, r"'x' has shape 1x9; the model expects batchx8"),
        ({"x": np.zeros((3, 2, 2, 2), np.float32)}, r"'x' has shape 3x2x2x2; the model expects batchx8"),
        ({"x": np.full((3, 8), np.nan, np.float32)}, "sample 0: input 'x' holds NaN or infinity"),
        ({"x": np.full((3, 8), np.inf, np.float32)}, "sample 0: input 'x' holds NaN or infinity"),
        ({"x": np.zeros((0, 8), np.float32)}, "is empty"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "'x' holds Python objects"),
        ({}, "is empty"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "d.npz", X)


def test_less_than_a_batch(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 8), np.float32))
    with pytest.raises(DataError, match="has shape 3x8; the model expects 5x8"):
        load_data(tmp_path / "d.npz", (spec(shape=(5, 8)),))


def test_inputs_of_different_length(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 8), np.float32), z=np.zeros((2, 8), np.float32))
    with pytest.raises(DataError, match=r"different numbers of samples: {'x': 3, 'z': 2}"):
        load_data(tmp_path / "d.npz", (*X, spec("z")))


def test_a_missing_input(data_path):
    with pytest.raises(DataError, match=r"input 'z' is missing; there are \['x'\]"):
        load_data(data_path, (*X, spec("z")))


def test_a_bad_sample_is_named(x):
    x[20, 3] = np.nan
    data = load_data([{"x": row[None]} for row in x], X)
    with pytest.raises(DataError, match="data, sample 20: input 'x' holds NaN"):
        list(data)


def test_sample_numbers_do_not_start_anew_in_a_part(x):
    x[20, 3] = np.nan
    _, evaluation = load_data([{"x": row[None]} for row in x], X).split(None)
    with pytest.raises(DataError, match="sample 20"):
        list(evaluation)


def test_objects_in_npy_are_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([print], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        load_data(tmp_path / "x.npy", X)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04rest", b"not a zip"])
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_files_that_are_something_else(tmp_path, content, suffix):
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.np. cannot be read"):
        load_data(path, X)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_npz(tmp_path, save):
    rng = np.random.default_rng(0)
    path = tmp_path / "d.npz"
    save(path, x=rng.normal(size=(64, 8)).astype(np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(DataError, match="cannot be read"):
        list(load_data(path, X))
    for position in range(300, len(whole) - 300, 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(DataError):
            list(load_data(path, X))


def test_npz_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", "hello")
    with pytest.raises(DataError, match="cannot be read"):
        load_data(tmp_path / "d.npz", X)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.npz", "there is no data at"), ("d.txt", "expected a .npz file"), ("folder", "has no .npz, no .npy")],
)
def test_paths_that_hold_no_data(tmp_path, name, message):
    (tmp_path / "d.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / name, X)


def test_broken_onnx_test_data(tmp_path):
    (tmp_path / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match=r"input_0.pb is not an ONNX tensor"):
        load_data(tmp_path, X)


@pytest.mark.parametrize("name", ["input_x.pb", "input_.pb", "input_1_2.pb"])
def test_oddly_named_onnx_test_data(tmp_path, name):
    onnx.save_tensor(numpy_helper.from_array(np.zeros((1, 8), np.float32), "x"), tmp_path / name)
    assert firsts(load_data(tmp_path, X)) == [0]


def test_check_feed_takes_any_open_dimension():
    check_feed({"x": np.zeros((7, 8), np.float32)}, X, "here")
