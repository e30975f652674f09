"""Sample data from every kind of source, checked and streamed."""

import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from onnxcomp.data import check_feed, load_data, load_function
from onnxcomp.errors import DataError
from onnxcomp.target import TensorSpec


def spec(name="x", shape=("batch", 8), dtype=np.float32):
    return TensorSpec(name=name, dtype=np.dtype(dtype), shape=shape)


X = (spec(),)


def feeds(count=6):
    return [{"x": np.full((1, 8), i, np.float32)} for i in range(count)]


def firsts(data):
    return [float(np.ravel(feed["x"])[0]) for feed in data]


# --- sources


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


@pytest.mark.parametrize(
    ("given_spec", "message"), [(spec(shape=None), "no known rank"), (spec(dtype=object), "is object")]
)
def test_random_that_cannot_be(given_spec, message):
    with pytest.raises(DataError, match=message):
        next(iter(load_data("random", (given_spec,))))


# --- what is refused


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


# --- parts


@pytest.mark.parametrize(
    ("samples", "eval_samples", "calibration", "evaluation"),
    [
        (None, None, range(10), range(10, 20)),
        (4, None, range(4), range(10, 20)),
        (None, 3, range(10), range(10, 13)),
        (4, 3, range(4), range(4, 7)),
        (100, 100, range(10), range(10, 20)),
    ],
)
def test_split(samples, eval_samples, calibration, evaluation):
    halves = load_data(feeds(20), X).split(samples, eval_samples)
    assert [firsts(h) for h in halves] == [list(calibration), list(evaluation)]
    assert not any(h.seen_by_calibration for h in halves)
    assert not set(halves[0].digests()) & set(halves[1].digests())


def test_split_reads_no_more_than_it_needs():
    def endless():
        while True:
            yield from feeds()

    calibration, evaluation = load_data(endless, X).split(3, 2)
    assert (len(calibration), len(evaluation)) == (3, 2)


def test_split_of_one_sample_says_so():
    calibration, evaluation = load_data(feeds(1), X).split(None)
    assert evaluation.seen_by_calibration
    assert firsts(calibration) == firsts(evaluation) == [0]


def test_take_of_a_part():
    _, evaluation = load_data(feeds(20), X).split(None)
    assert firsts(evaluation.take(3)) == [10, 11, 12]
    assert firsts(evaluation.take(3).take(5)) == [10, 11, 12]
    assert len(evaluation.take(None)) == 10


def test_digests_tell_shapes_types_and_names_apart():
    arrays = [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32), np.ones((2, 3))]
    every = [{name: a} for a in arrays for name in ("x", "y")]
    found = set()
    for feed in every:
        ((name, array),) = feed.items()
        found.update(load_data([feed], (spec(name, array.shape, array.dtype),)).digests())
    assert len(found) == len(every)


# --- streaming


@st.composite
def archives(draw):
    """Arrays with a common number of samples, and how each is to be cut."""
    samples = draw(st.integers(1, 5))
    arrays, specs = {}, []
    for name in draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True)):
        dtype = draw(st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_]))
        rest = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
        kind = draw(st.sampled_from(["open", "batch", "before"]))
        batch = draw(st.integers(1, 3)) if kind == "batch" else 1
        shape = (samples * batch, *rest)
        finite = {"allow_nan": False, "allow_infinity": False} if issubclass(dtype, np.floating) else None
        array = draw(hnp.arrays(dtype, shape, elements=finite))
        arrays[name] = np.asfortranarray(array) if draw(st.booleans()) else array
        specs.append(spec(name, {"open": ("n", *rest), "batch": (batch, *rest), "before": rest}[kind], dtype))
    return samples, arrays, tuple(specs), draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(archives())
def test_streaming_equals_loading(case):
    samples, arrays, specs, compressed = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "d.npz")
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        found = list(load_data(path, specs))
    assert len(found) == samples
    for s in specs:
        parts = [f[s.name] for f in found]
        assert all(p.dtype == s.dtype for p in parts)
        joined = np.stack(parts) if len(s.shape) < arrays[s.name].ndim else np.concatenate(parts)
        np.testing.assert_array_equal(joined, arrays[s.name])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_feed_is_in_memory_at_a_time(tmp_path, save):
    save(tmp_path / "d.npz", x=np.zeros((200, 100_000), np.float32))  # 80 MB
    data = load_data(tmp_path / "d.npz", (spec(shape=("n", 100_000)),))
    tracemalloc.start()
    try:
        assert sum(1 for _ in data) == 200
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6
