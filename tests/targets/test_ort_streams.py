"""Streams over one loaded model: state of their own, in place or not, that can be taken away, given back and stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import streams
from builder import Builder
from onnx import TensorProto
from typing_extensions import override

from onnxcomp.errors import DataError, DeviceError, OnnxcompError, UnsupportedError
from onnxcomp.state import StateSpec, load_state, save_state
from onnxcomp.target import Array, Artifact, Feed, Session, TensorSpec
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.rows import Axis, Rows, RowsSession
from onnxcomp.targets.ort.session import OrtSession, probe_session
from onnxcomp.verbs.resolve import compiled

STEPS = 12


def sums(*, in_place: bool = True) -> ir.Model:
    """Keeps a running sum, `before`, which an Add can write over, and the input of the last step without element 3.

    The output is 2 times the sum minus what came last.
    """
    b = Builder()
    x = b.input("x", [4])
    total = b.op("Add", b.input("before", [4]), x, name="total")
    twice = b.op("Mul", total, b.const(np.float32(2)))
    y = b.op("Sub", twice, b.input("last", [4]), name="y")
    kept = b.op("Mul", x, b.const(np.array([1, 1, 1, 0], np.float32)), name="kept")
    b.metadata["onnxcomp.state"] = json.dumps(
        [
            {"input": "before", "output": total, "shape": [4], "dtype": "float32", "in_place": in_place},
            {"input": "last", "output": kept, "shape": [4], "dtype": "float32"},
        ]
    )
    return b.output(y).output(kept).output(total).model()


def reference(feeds: Sequence[Feed]) -> list[Array]:
    total, last, found = np.zeros(4, np.float32), np.zeros(4, np.float32), []
    for feed in feeds:
        total = total + feed["x"]
        found.append(total * np.float32(2) - last)
        last = feed["x"] * np.array([1, 1, 1, 0], np.float32)
    return found


def sequence(seed: int, count: int = STEPS) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=4).astype(np.float32)} for _ in range(count)]


Load = Callable[..., Any]


@pytest.fixture(params=[True, False], ids=["in place", "handed on"])
def in_place(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Compiles and loads a model, from the folder `artifact`."""

    def loaded(model: ir.Model, name: str = "artifact") -> Session:
        target = OrtCpu()
        return target.load(target.open(target.compile(model, tmp_path / name).path))

    return loaded


def first(session: Session, feeds: Sequence[Feed]) -> list[Array]:
    return [next(iter(session.run(feed).values())) for feed in feeds]


def same(found: Sequence[Array], wanted: Sequence[Array]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stream(load, in_place):
    session = load(sums(in_place=in_place))
    assert [s.name for s in session.outputs] == ["y_out"]
    found = first(session, sequence(0))  # kept, so that a run which wrote over an earlier result would show
    same(found, reference(sequence(0)))
    session.reset()
    same(first(session, sequence(1)), reference(sequence(1)))


def test_eight_interleaved_streams_equal_their_own_runs(load, in_place):
    session = load(sums(in_place=in_place))
    session.run(sequence(99)[0])
    several = [session.stream() for _ in range(8)]
    feeds = [sequence(i) for i in range(8)]
    found: list[list[Array]] = [[] for _ in several]
    for step in range(STEPS):
        for i, stream in enumerate(several):
            found[i] += first(stream, [feeds[i][step]])
    for i in range(8):
        same(found[i], reference(feeds[i]))
    same(first(session, sequence(99)[1:]), reference(sequence(99))[1:])


def test_streams_on_several_threads(load, in_place):
    session = load(sums(in_place=in_place))
    several = [session.stream() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: first(several[i], sequence(i, 200)), range(8)))
    for i in range(8):
        same(found[i], reference(sequence(i, 200)))


def test_streams_share_the_loaded_model(load, in_place):
    session = load(sums(in_place=in_place))
    other = session.stream()
    assert other._session is session._session
    del session
    same(first(other.stream(), sequence(0)), reference(sequence(0)))


def test_state_in_place_stays_in_one_buffer_and_other_state_takes_turns(load):
    session = load(sums())
    places = []
    for feed in sequence(0):
        session.run(feed)
        places.append({name: array.ctypes.data for name, array in session._carried.read().items()})
    assert len({p["before"] for p in places}) == 1
    assert [p["last"] for p in places[:2]] * (STEPS // 2) == [p["last"] for p in places]
    assert len({p["last"] for p in places}) == 2
    assert all(address % 64 == 0 for p in places for address in p.values())


def test_buffers_are_bound_once_a_stream(load, monkeypatch):
    session = load(sums())
    bound = []
    for binding in session._carried._bindings:
        for name in ("bind_ortvalue_input", "bind_ortvalue_output"):
            monkeypatch.setattr(binding, name, lambda *given: bound.append(given))
    same(first(session, sequence(0)), reference(sequence(0)))
    assert not bound


def test_feeds_are_taken_as_they_are(load, in_place):
    session = load(sums(in_place=in_place))
    feed = sequence(0)[0]["x"]
    wide = np.zeros((4, 2), np.float32)
    wide[:, 0] = feed
    backwards = feed[::-1].copy()[::-1]
    feed.flags.writeable = False
    (wanted,) = reference([{"x": feed}])
    for array in (feed, wide[:, 0], backwards):
        session.reset()
        same(first(session, [{"x": array}]), [wanted])
    np.testing.assert_array_equal(wide[:, 1], 0)


def test_strings_scalars_and_empty_tensors(load, in_place):
    b = Builder()
    words = b.op("Identity", b.input("words", ["n"], TensorProto.STRING))
    count = b.op("Add", b.input("count", [], TensorProto.INT64), b.input("more", [], TensorProto.INT64))
    empty = b.op("Identity", b.input("nothing", [0, 3]))
    b.metadata["onnxcomp.state"] = json.dumps(
        [
            {"input": "count", "output": count, "shape": [], "dtype": "int64", "in_place": in_place},
            {"input": "nothing", "output": empty, "shape": [0, 3], "dtype": "float32"},
        ]
    )
    session = load(b.output(words, TensorProto.STRING).output(count, TensorProto.INT64).output(empty).model())
    for _ in range(3):
        found = session.run({"words": np.array(["a", "bc"], object), "more": np.array(2, np.int64)})
    assert found[words].tolist() == ["a", "bc"]
    state = session.state()
    assert (state["count"].shape, int(state["count"]), state["nothing"].shape) == ((), 6, (0, 3))
    session.restore({**state, "count": np.array(40, np.int64)})
    session.run({"words": np.array(["a"]), "more": np.array(2, np.int64)})
    assert int(session.state()["count"]) == 42


def test_state_is_copied_out_and_in(load, in_place):
    session = load(sums(in_place=in_place))
    feeds = sequence(0)
    first(session, feeds[:5])
    state = session.state()
    assert set(state) == {"before", "last"}
    kept = {name: array.copy() for name, array in state.items()}
    rest = first(session, feeds[5:])
    for name in state:
        np.testing.assert_array_equal(state[name], kept[name])
    other = session.stream()
    other.restore(state)
    for array in state.values():
        array[...] = np.nan
    same(first(other, feeds[5:]), rest)
    session.restore(kept)
    same(first(session, feeds[5:]), rest)
    zeros = session.stream().state()
    assert not any(array.any() for array in zeros.values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("last"), r"'last' is missing in the state; the model carries \['before', 'last'\]"),
        (lambda s: s.update(more=s["last"]), "'more' is unknown"),
        (lambda s: s.update(last=s["last"][:3]), r"'last' is float32\[3\]; the model carries float32\[4\]"),
        (lambda s: s.update(last=s["last"].astype(np.float64)), r"'last' is float64\[4\]"),
        (lambda s: s.update(last=[0.0] * 4), "'last' is a list"),
    ],
)
def test_state_that_does_not_fit(load, in_place, change, match):
    session = load(sums(in_place=in_place))
    feeds = sequence(0)
    first(session, feeds[:5])
    state = {name: np.zeros_like(array) for name, array in session.state().items()}
    change(state)
    with pytest.raises(DataError, match=match):
        session.restore(state)
    same(first(session, feeds[5:]), reference(feeds)[5:])


def fragile(*, in_place: bool) -> ir.Model:
    """A running sum of all of `x`, and `x` as a square of 4, which fails for any other number."""
    b = Builder()
    x = b.input("x", ["n"])
    added = b.op("Add", b.input("before", [1]), b.op("ReduceSum", x), name="added")
    y = b.op("Reshape", x, b.const(np.array([2, 2])), name="square")
    b.metadata["onnxcomp.state"] = json.dumps(
        [{"input": "before", "output": added, "shape": [1], "dtype": "float32", "in_place": in_place}]
    )
    return b.output(y).output(added).model()


def test_a_failed_run_leaves_state_that_is_not_in_place(load):
    session = load(fragile(in_place=False))
    session.run({"x": np.ones(4, np.float32)})
    with pytest.raises(DeviceError, match="square") as failed:
        session.run({"x": np.ones(3, np.float32)})
    assert "lost" not in str(failed.value)
    session.run({"x": np.ones(4, np.float32)})
    assert session.state()["before"].tolist() == [8.0]


def test_a_failed_run_loses_state_in_place(load):
    session = load(fragile(in_place=True))
    other = session.stream()
    good = {"x": np.ones(4, np.float32)}
    session.run(good)
    with pytest.raises(DataError):
        session.run({})
    before = session.state()
    assert before["before"].tolist() == [4.0]
    for recover in (session.reset, lambda: session.restore(before)):
        with pytest.raises(DeviceError, match=r"square.*state is lost: call reset\(\) or restore\(\)"):
            session.run({"x": np.ones(3, np.float32)})
        for refused in (lambda: session.run(good), session.state, lambda: session.save_state("unwritten")):
            with pytest.raises(DeviceError, match=r"earlier run failed.*reset\(\), or restore\(\)"):
                refused()
        other.run(good)
        recover()
        session.run(good)
    assert session.state()["before"].tolist() == [8.0]
    assert other.state()["before"].tolist() == [8.0]
    assert not Path("unwritten").exists()


def test_an_interrupted_run_loses_state_in_place(load, monkeypatch):
    session = load(fragile(in_place=True))

    def interrupted(feed):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session._carried, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run({"x": np.ones(4, np.float32)})
    with pytest.raises(DeviceError, match="earlier run failed"):
        session.run({"x": np.ones(4, np.float32)})


def test_probes_keep_state_apart():
    model = sums()
    session = probe_session(model, ["before", "total_out", "y_out"])
    found = [session.run(feed) for feed in sequence(0)]
    same([f["y_out"] for f in found], reference(sequence(0)))
    same([f["before"] for f in found[1:]], [f["total_out"] for f in found[:-1]])


def test_returned_state_is_not_the_buffer(load):
    inner = load(sums())
    session = OrtSession(inner._session, inner.states, returns=["total_out", "y_out"])
    found = [session.run(feed)["total_out"] for feed in sequence(0)]
    np.testing.assert_allclose(found, np.cumsum([f["x"] for f in sequence(0)], axis=0), rtol=1e-5)


def test_times_and_memory_of_state_in_place(tmp_path):
    artifact = OrtCpu().compile(sums(), tmp_path / "a")
    feed = sequence(0)[0]
    assert {t.op_type for t in OrtCpu().node_times(artifact, feed, repeat=2)} >= {"Add", "Mul", "Sub"}
    assert OrtCpu().peak_memory(artifact, feed) > 0


@pytest.fixture
def delta_artifact(tmp_path: Path) -> Artifact:
    """Of a step model, whose kernels work in place where the native library has them."""
    model, _ = streams.delta(streams.cnn(), streams.frames(6), threshold=0.0)
    return compiled(model, OrtCpu(), tmp_path / "artifact")


def test_streams_of_a_delta_model(delta_artifact):
    feeds = [streams.frames(20, seed=i) for i in range(8)]
    session = OrtCpu().load(delta_artifact)
    several = [session.stream() for _ in range(8)]
    found: list[list[Array]] = [[] for _ in several]
    for step in range(20):
        for i, stream in enumerate(several):
            found[i] += first(stream, [feeds[i][step]])
    dense = streams.cnn()
    for i in range(8):
        same(found[i], first(OrtCpu().load(delta_artifact), feeds[i]))
        assert streams.largest(found[i], streams.stream(dense, feeds[i])) < 1e-5  # kernels add in another order
    again = [session.stream() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(lambda i: first(again[i], feeds[i]), range(8))):
            same(results, found[i])


class Minimal(Session):
    """What a target had to write before sessions had streams."""

    @property
    @override
    def inputs(self) -> Sequence[TensorSpec]:
        return ()

    @property
    @override
    def outputs(self) -> Sequence[TensorSpec]:
        return ()

    @override
    def run(self, feed: Feed) -> dict[str, Array]:
        return {}

    @override
    def reset(self) -> None:
        pass


class Closed(Minimal):
    """Carries state, but does not give it away."""

    @property
    @override
    def states(self) -> Sequence[StateSpec]:
        return (StateSpec(input="a", output="b", shape=[1], dtype="bool"),)


def test_sessions_of_others(tmp_path):
    session = Minimal()
    assert (session.state(), session.stream(), tuple(session.states)) == ({}, session, ())
    session.restore({})
    with pytest.raises(DataError, match="carries no state, but some was given for 'a'"):
        session.restore({"a": np.zeros(1)})
    session.save_state(tmp_path / "empty.npz")
    session.load_state(tmp_path / "empty.npz")
    calls: list[Callable[[], object]] = [Closed().state, Closed().stream, lambda: Closed().restore({})]
    for call in calls:
        with pytest.raises(UnsupportedError, match="Closed does not give"):
            call()


def test_rows_sessions_are_every_stream(mlp, load):
    loads = []

    def many() -> Session:
        loads.append(1)
        return few

    few = load(ir.from_proto(mlp()))
    session = RowsSession(few, many, Rows(axes=[Axis(input="x", axis=0)], factor=1))
    stream = session.stream()
    for rows in (1, 3, 5):
        feed = {"x": np.ones((rows, 8), np.float32)}
        np.testing.assert_array_equal(stream.run(feed)["y"], few.run(feed)["y"])
    assert (session.state(), loads) == ({}, [1])


# On disk


@pytest.fixture
def stored(load, tmp_path: Path) -> tuple[Session, Path]:
    """A session after 5 steps, and the file of its state."""
    session = load(sums())
    first(session, sequence(0)[:5])
    session.save_state(tmp_path / "state.npz")
    return session, tmp_path / "state.npz"


def test_saved_state_goes_on(stored, tmp_path):
    session, path = stored
    assert sorted(os.listdir(tmp_path)) == ["artifact", "state.npz"]
    rest = first(session, sequence(0)[5:])
    other = session.stream()
    other.load_state(path)
    same(first(other, sequence(0)[5:]), rest)
    session.save_state(path)  # over the first
    assert sorted(os.listdir(tmp_path)) == ["artifact", "state.npz"]
    found = load_state(path)
    for name, array in session.state().items():
        np.testing.assert_array_equal(found[name], array)


CONTINUE = """
import sys, numpy as np
from pathlib import Path
from onnxcomp.targets.ort import OrtCpu
folder = Path(sys.argv[1])
target = OrtCpu()
session = target.load(target.open(folder / "artifact"))
session.load_state(folder / "state.npz")
feeds = np.load(folder / "feeds.npy")
np.save(folder / "found.npy", [next(iter(session.run({"x": x}).values())) for x in feeds])
"""


def goes_on_in_another_process(session: Session, feeds: Sequence[Feed], folder: Path) -> None:
    """With the artifact in `folder`; 20 steps here and 20 there give the bits of 40."""
    whole = first(session, feeds)
    session.reset()
    first(session, feeds[:20])
    session.save_state(folder / "state.npz")
    np.save(folder / "feeds.npy", [f["x"] for f in feeds[20:]])
    subprocess.run([sys.executable, "-c", CONTINUE, str(folder)], check=True)
    assert np.load(folder / "found.npy").tobytes() == np.array(whole[20:]).tobytes()
    assert len({array.tobytes() for array in whole[20:]}) > 5


def test_another_process_goes_on_bit_for_bit(load, in_place, tmp_path):
    goes_on_in_another_process(load(sums(in_place=in_place)), sequence(3, 40), tmp_path)


def test_another_process_goes_on_with_a_delta_model(delta_artifact, tmp_path):
    goes_on_in_another_process(OrtCpu().load(delta_artifact), streams.frames(40), tmp_path)


def test_state_of_another_model(stored, load):
    _, path = stored
    model = sums()
    next(n for n in model.graph if n.op_type == "Sub").name = "other"
    other = load(model, "other")
    with pytest.raises(DataError, match="state of another model"):
        other.load_state(path)
    with pytest.raises(DataError, match="state of another model"):
        load_state(path, model_hash="0" * 64)
    other.restore(load_state(path))


def test_weights_beside_the_model_count(monkeypatch, load):
    monkeypatch.setattr("onnxcomp.model.EXTERNAL_THRESHOLD", 0)

    def scaled(factor: float, name: str) -> str:
        b = Builder()
        y = b.op("Mul", b.input("x", [400]), b.const(np.full(400, factor, np.float32)))
        return str(load(b.output(y).model(), name).model_hash)

    assert scaled(1.0, "a") == scaled(1.0, "b") != scaled(2.0, "c")


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(path, **arrays)


def header(arrays: dict[str, Any], **changes: object) -> None:
    fields = {**json.loads(arrays["header"].tobytes()), **changes}
    arrays["header"] = np.frombuffer(json.dumps(fields).encode(), np.uint8)


def test_damaged_files(stored, tmp_path):
    session, path = stored
    whole = path.read_bytes()
    before = session.state()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"state\.npz is no state of a stream, or is damaged"):
            session.load_state(path)
    start = whole.index(before["before"].tobytes())
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    with pytest.raises(DataError, match="damaged"):
        session.load_state(path)
    with pytest.raises(DataError, match="no state at"):
        session.load_state(tmp_path / "nowhere.npz")
    with pytest.raises(DataError, match="no state at"):
        session.load_state(tmp_path)
    np.testing.assert_array_equal(session.state()["before"], before["before"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a.pop("header"), "header"),
        (lambda a: a.update(header=np.zeros(3, np.uint8)), "damaged"),
        (lambda a: header(a, format="other"), "format"),
        (lambda a: header(a, version=2), "version"),
        (lambda a: header(a, more=1), "more"),
        (lambda a: header(a, names=["before"]), "arrays without a name"),
        (lambda a: header(a, names=["before", "before"]), "arrays without a name"),
        (lambda a: header(a, names=["before", "other"]), "is (missing|unknown)"),
        (lambda a: a.pop("state_1"), "state_1"),
        (lambda a: a.update(state_1=np.zeros(3, np.float32)), r"'last' is float32\[3\]"),
        (lambda a: a.update(state_1=np.zeros(4, np.float64)), "float64"),
        (lambda a: a.update(state_1=np.array([print] * 4, object)), "size that it states"),
        (lambda a: a.update(state_1=np.zeros(1 << 20)), "more than the"),
        (lambda a: (a.clear(), a.update(x=np.zeros(4))), "header"),
    ],
)
def test_foreign_files(stored, change, match):
    session, path = stored
    rewritten(path, change)
    with pytest.raises(DataError, match=match):
        session.load_state(path)


def test_sizes_are_believed_only_if_the_file_has_them(stored, tmp_path):
    session, path = stored
    large = tmp_path / "large.npz"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(large, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "state_1.npy":
                content = content.replace(b"(4,), }" + 15 * b" ", b"(4444444444444444,), }")
                assert b"4444" in content
            new.writestr(name, content)
    for states in (session.states, None):
        with pytest.raises(DataError, match="damaged"):
            load_state(large, states=states)


def test_any_names_are_stored(tmp_path):
    state: Mapping[str, Array] = {"file": np.ones(2), "a/../b": np.ones((2, 3), order="F"), "": np.array(3, np.float16)}
    save_state(tmp_path / "s", state, model_hash="")
    found = load_state(tmp_path / "s")
    assert list(found) == list(state)
    for name, array in state.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].flags.writeable) == (array.dtype, True)


def test_a_failed_write_keeps_the_old_state(stored, tmp_path, monkeypatch):
    session, path = stored
    before = path.read_bytes()
    session.run(sequence(0)[5])

    def fail(source: object, destination: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OnnxcompError, match=r"cannot write the state.*disk on fire"):
        session.save_state(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["artifact", "state.npz"]
    with pytest.raises(OnnxcompError, match="cannot write the state"):
        session.save_state(tmp_path / "no" / "such" / "state.npz")
