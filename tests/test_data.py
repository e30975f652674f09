"""Sample data from every kind of source."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from samples import X, feeds, firsts, spec

from onnxcomp.data import load_data, load_function
from onnxcomp.errors import DataError


def test_npz_is_cut_along_the_samples(data_path, x):
    data = load_data(data_path, X)
    assert len(data) == 32
    for index, feed in enumerate(data):
        np.testing.assert_array_equal(feed["x"], x[index : index + 1])
    assert len(list(data)) == 32, "it can be iterated again"


def test_npz_with_a_fixed_batch(data_path, x):
    found = list(load_data(data_path, (spec(shape=(5, 8)),)))
    assert len(found) == 6, "a part of a batch at the end is left out"
    np.testing.assert_array_equal(found[5]["x"], x[25:30])


def test_npz_with_an_axis_of_samples_before(tmp_path):
    array = np.arange(48, dtype=np.float32).reshape(3, 2, 8)
    np.savez(tmp_path / "d.npz", x=array)
    found = list(load_data(tmp_path / "d.npz", (spec(shape=(2, 8)),)))
    np.testing.assert_array_equal(np.stack([f["x"] for f in found]), array)


def test_a_scalar_goes_into_every_feed(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 8), np.float32), rate=np.int64(16000))
    found = list(load_data(tmp_path / "d.npz", (*X, spec("rate", (), np.int64))))
    assert [f["rate"].tolist() for f in found] == [16000] * 3
    assert found[0]["rate"].shape == ()


def test_scalars_one_a_sample(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 8), np.float32), rate=np.arange(3))
    found = list(load_data(tmp_path / "d.npz", (*X, spec("rate", (), np.int64))))
    assert [f["rate"].tolist() for f in found] == [0, 1, 2]


def test_an_input_of_unknown_rank_is_taken_whole(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 8), np.float32))
    assert [f["x"].shape for f in load_data(tmp_path / "d.npz", (spec(shape=None),))] == [(3, 8)]


def test_folder_of_npz(tmp_path):
    for i, count in enumerate((2, 3)):
        np.savez(tmp_path / f"{i}.npz", x=np.full((count, 8), i, np.float32))
    assert firsts(load_data(tmp_path, X)) == [0, 0, 1, 1, 1]


def test_npy_for_the_only_input(tmp_path):
    np.save(tmp_path / "anything.npy", np.stack([np.full(8, i, np.float32) for i in range(3)]))
    assert firsts(load_data(tmp_path / "anything.npy", X)) == [0, 1, 2]
    assert firsts(load_data(tmp_path, X)) == [0, 1, 2]


def test_folder_of_npy_named_as_the_inputs(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 8), np.float32))
    np.save(tmp_path / "ids.npy", np.arange(3).reshape(3, 1))
    found = list(load_data(tmp_path, (*X, spec("ids", ("batch", 1), np.int64))))
    assert [f["ids"].tolist() for f in found] == [[[0]], [[1]], [[2]]]


@pytest.mark.parametrize("name", ["x", "", "another"])
def test_onnx_test_data(tmp_path, name):
    for i in range(11):
        folder = tmp_path / f"test_data_set_{i}"
        folder.mkdir()
        tensor = numpy_helper.from_array(np.full((1, 8), i, np.float32), name)
        onnx.save_tensor(tensor, folder / "input_0.pb")
    assert firsts(load_data(tmp_path, X)) == list(range(11)), "10 comes behind 9"
    assert firsts(load_data(tmp_path / "test_data_set_3", X)) == [3]


def test_onnx_test_data_goes_by_name_before_position(tmp_path):
    for i, name in enumerate(("b", "a")):
        onnx.save_tensor(numpy_helper.from_array(np.full(1, i, np.float32), name), tmp_path / f"input_{i}.pb")
    (feed,) = load_data(tmp_path, (spec("a", (1,)), spec("b", (1,))))
    assert (feed["a"][0], feed["b"][0]) == (1, 0)


def test_callable_and_iterable():
    assert firsts(load_data(feeds, X)) == list(range(6))
    assert firsts(load_data(feeds(), X)) == list(range(6))
    with pytest.raises(DataError, match="iterated only once"):
        load_data(iter(feeds()), X)


def test_module_and_function(tmp_path, monkeypatch):
    Path(tmp_path, "my_feeds_1.py").write_text(
        "import numpy as np\ndef get():\n    for i in range(3):\n        yield {'x': np.full((1, 8), i, np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert firsts(load_data("my_feeds_1:get", X)) == [0, 1, 2]
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_module_1:f", "module 'no_such_module_1' of .* cannot be imported: No module"),
        ("os:no_such", "module 'os' has no function 'no_such'"),
        (":f", "not of the form module:function"),
        ("os:", "not of the form module:function"),
        ("broken_1:f", "'broken_1:f' cannot be imported: ZeroDivisionError: division by zero"),
        ("syntax_1:f", "'syntax_1:f' cannot be imported: SyntaxError"),
    ],
)
def test_function_that_is_not_there(tmp_path, monkeypatch, text, message):
    Path(tmp_path, "broken_1.py").write_text("1 / 0\n")
    Path(tmp_path, "syntax_1.py").write_text("def\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_function(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "raised TypeError"),
        ("yield 3", "sample 0: a feed has to be a mapping of input name to array, not int"),
        ("raise KeyError('label')", "raised KeyError: 'label'"),
        ("return []", "is empty"),
    ],
)
def test_function_that_gives_no_feeds(tmp_path, monkeypatch, body, message, request):
    module = f"feeds_{abs(hash(request.node.name))}"
    Path(tmp_path, f"{module}.py").write_text(f"def get():\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_data(f"{module}:get", X)


def test_random_is_seeded_and_fits():
    inputs = (*X, spec("i", (2,), np.int64), spec("b", (3,), np.bool_), spec("h", (), np.float16))
    first, again, other = (list(load_data("random", inputs, seed=s)) for s in (0, 0, 1))
    assert len(first) == 16
    np.testing.assert_array_equal(first[7]["x"], again[7]["x"])
    assert not np.array_equal(first[7]["x"], other[7]["x"])
