"""Sample data: feeds from files, folders, or Python functions, streamed one at a time and checked against the model."""

from __future__ import annotations

import importlib
import itertools
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxcomp.errors import DataError
from onnxcomp.target import Array, Feed, TensorSpec

Source: TypeAlias = "str | Path | Callable[[], Iterable[Feed]] | Iterable[Feed]"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Feeds that can be iterated many times. Nothing is kept in memory between feeds.

    Attributes:
        name: What messages call the data.
        open: Starts a new iteration over all feeds.
        inputs: The model's inputs; every feed is checked against them.
        start: First feed to yield.
        stop: Feed to stop before, or None for all.
        seen_by_calibration: The data is also what calibration saw, so a fidelity on it is no claim.
    """

    name: str
    open: Callable[[], Iterator[Feed]]
    inputs: tuple[TensorSpec, ...]
    start: int = 0
    stop: int | None = None
    seen_by_calibration: bool = False

    def __iter__(self) -> Iterator[Feed]:
        for index, feed in enumerate(itertools.islice(self.open(), self.start, self.stop), self.start):
            yield check_feed(feed, self.inputs, f"{self.name}, sample {index}")

    def take(self, count: int | None) -> Data:
        """The first `count` of these feeds; all if None."""
        if count is None:
            return self
        stop = self.start + count if self.stop is None else min(self.stop, self.start + count)
        return replace(self, stop=stop)

    def count(self) -> int:
        """Number of feeds, found by iterating without checking."""
        return sum(1 for _ in itertools.islice(self.open(), self.start, self.stop))

    def split(self, samples: int | None) -> tuple[Data, Data]:
        """Splits into calibration and evaluation data that share no feed.

        The first half calibrates, at most `samples` feeds of it; the second half evaluates. Neighbouring feeds are
        often alike (crops of one picture, frames of one video), so halves are kept together. A single feed serves as
        both, and `seen_by_calibration` is set.

        Raises:
            DataError: If there is no feed.
        """
        total = self.count()
        if total == 0:
            raise DataError(f"{self.name} is empty")
        if total == 1:
            return self, replace(self, seen_by_calibration=True)
        middle = self.start + total // 2
        return replace(self, stop=middle).take(samples), replace(self, start=middle)


def load_data(source: Source, inputs: Sequence[TensorSpec], *, seed: int = 0) -> Data:
    """Opens sample data.

    Args:
        source: One of: a `.npz` file, one array an input (first axis: samples, or one feed if the shape is the
            input's); a folder of `.npz` files (one feed each), of `.npy` files (one array an input, named as the
            input), or of ONNX `test_data_set_*` folders; such a `test_data_set_*` folder; `module:function`, which
            returns an iterable of feeds; `random`, for smoke tests; a callable or a re-iterable of feeds.
        inputs: The model's inputs.
        seed: For `random`.

    Raises:
        DataError: If the source does not exist, cannot be read, or is empty.
    """
    specs = tuple(inputs)
    if callable(source):
        return _checked(Data(name=getattr(source, "__name__", "data"), open=lambda: iter(source()), inputs=specs))
    if not isinstance(source, (str, Path)):
        if iter(source) is source:
            raise DataError("the data can be iterated only once; give a list or a function that returns an iterator")
        return _checked(Data(name="data", open=lambda: iter(source), inputs=specs))
    text = str(source)
    if text == "random":
        return Data(name="random data", open=lambda: _random(specs, seed), inputs=specs, stop=16)
    path = Path(source)
    if not path.exists() and ":" in text:
        function = load_function(text)
        return _checked(Data(name=text, open=lambda: _from_function(function, text), inputs=specs))
    if not path.exists():
        raise DataError(f"there is no data at {path}")
    return _checked(Data(name=str(path), open=_opener(path, specs), inputs=specs))


def load_function(text: str) -> Callable[..., Any]:
    """Imports `module:function`; the current folder is searched as well.

    Raises:
        DataError: If the module or the function does not exist.
    """
    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise DataError(f"{text!r} is not of the form module:function")
    added = "" not in sys.path and str(Path.cwd()) not in sys.path
    if added:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise DataError(f"module {module_name!r} of {text!r} cannot be imported: {error}") from error
    finally:
        if added:
            sys.path.remove(str(Path.cwd()))
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"module {module_name!r} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def check_feed(feed: Any, inputs: Sequence[TensorSpec], where: str) -> Feed:
    """Checks names, dtypes, shapes and finiteness of one feed.

    Raises:
        DataError: Naming the sample, the input, and what the model expects.
    """
    if not isinstance(feed, Mapping):
        raise DataError(f"{where}: a feed has to be a mapping of input name to array, not {type(feed).__name__}")
    names = {i.name for i in inputs}
    if unknown := sorted(map(str, set(feed) - names)):
        raise DataError(f"{where}: the model has no input {unknown[0]!r}; its inputs are {sorted(names)}")
    if missing := sorted(names - set(feed)):
        raise DataError(f"{where}: input {missing[0]!r} is missing; there are {sorted(map(str, feed))}")
    for spec in inputs:
        array = np.asarray(feed[spec.name])
        if array.dtype != spec.dtype:
            raise DataError(f"{where}: input {spec.name!r} is {array.dtype}; the model expects {spec.dtype}")
        if spec.shape is not None and not _fits(array.shape, spec.shape):
            raise DataError(
                f"{where}: input {spec.name!r} has shape {_text(array.shape)}; the model expects {_text(spec.shape)}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{where}: input {spec.name!r} holds NaN or infinity")
    return feed


def _text(shape: Sequence[int | str | None]) -> str:
    return "x".join("?" if d is None else str(d) for d in shape) or "scalar"


def _fits(shape: tuple[int, ...], spec: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(spec) and all(not isinstance(e, int) or e == a for a, e in zip(shape, spec, strict=True))


def _checked(data: Data) -> Data:
    """Looks at the first feed, so that a wrong source fails before any work is done."""
    if next(iter(data), None) is None:
        raise DataError(f"{data.name} is empty")
    return data


def _from_function(function: Callable[[], Iterable[Feed]], text: str) -> Iterator[Feed]:
    try:
        yield from function()
    except TypeError as error:
        raise DataError(f"{text} has to be callable without arguments and return feeds: {error}") from error


def _opener(path: Path, inputs: tuple[TensorSpec, ...]) -> Callable[[], Iterator[Feed]]:
    if path.is_file():
        if path.suffix == ".npz":
            return lambda: _from_npz(path, inputs)
        if path.suffix == ".npy" and len(inputs) == 1:
            return lambda: _from_arrays({inputs[0].name: path}, inputs)
        raise DataError(f"{path}: expected a .npz file{'' if len(inputs) == 1 else ' (the model has several inputs)'}")
    if sets := sorted(path.glob("test_data_set_*")):
        return lambda: (_from_protobuf(s, inputs) for s in sets)
    if any(path.glob("input_*.pb")):
        return lambda: iter([_from_protobuf(path, inputs)])
    if archives := sorted(path.glob("*.npz")):
        return lambda: itertools.chain.from_iterable(_from_npz(a, inputs) for a in archives)
    arrays = {p.stem: p for p in sorted(path.glob("*.npy"))}
    if not arrays:
        raise DataError(f"{path} has no .npz, no .npy and no test_data_set_*")
    if len(inputs) == 1 and inputs[0].name not in arrays:
        files = list(arrays.values())
        return lambda: itertools.chain.from_iterable(_from_arrays({inputs[0].name: f}, inputs) for f in files)
    return lambda: _from_arrays(arrays, inputs)


def _from_arrays(files: Mapping[str, Path], inputs: tuple[TensorSpec, ...]) -> Iterator[Feed]:
    try:
        arrays = {k: np.load(v, mmap_mode="r", allow_pickle=False) for k, v in files.items()}
    except (OSError, ValueError) as error:
        raise DataError(f"{', '.join(map(str, files.values()))}: {error}") from error
    rows = {k: _rows(a.shape, _spec(inputs, k)) for k, a in arrays.items()}
    for i in range(_common_length(rows, ", ".join(map(str, files.values())))):
        yield {k: np.array(a[rows[k].item(i)]) for k, a in arrays.items()}


def _from_npz(path: Path, inputs: tuple[TensorSpec, ...]) -> Iterator[Feed]:
    """Decompresses every member as a stream, so that one feed is in memory and not the archive."""
    try:
        with zipfile.ZipFile(path) as archive, ExitStack() as streams:
            rows: dict[str, _Rows] = {}
            readers: dict[str, Iterator[Array]] = {}
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                stream = streams.enter_context(archive.open(member))
                shape, fortran, dtype = _npy_header(stream)
                if dtype.hasobject:
                    raise DataError(f"{path}: {name!r} holds Python objects, which are not read")
                rows[name] = _rows(shape, _spec(inputs, name))
                readers[name] = _stream(stream, shape, fortran, dtype, rows[name])
            for _ in range(_common_length(rows, str(path))):
                yield {name: next(reader) for name, reader in readers.items()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


@dataclass(frozen=True)
class _Rows:
    """How an array of samples is cut into feeds: `count` of `size` rows each; size 0 drops the axis, -1 is whole."""

    count: int
    size: int

    def item(self, i: int) -> Any:
        if self.size < 0:
            return ...
        return i if self.size == 0 else slice(i * self.size, (i + 1) * self.size)


def _rows(shape: tuple[int, ...], spec: TensorSpec | None) -> _Rows:
    if spec is None or spec.shape is None or not shape:
        return _Rows(1, -1)
    if len(shape) == len(spec.shape) + 1:
        return _Rows(shape[0], 0)
    batch = spec.shape[0] if spec.shape else None
    if len(shape) != len(spec.shape) or not spec.shape:
        return _Rows(1, -1)  # wrong rank: check_feed says so
    size = batch if isinstance(batch, int) and batch > 0 else 1
    return _Rows(shape[0] // size, size)


def _spec(inputs: Sequence[TensorSpec], name: str) -> TensorSpec | None:
    return next((i for i in inputs if i.name == name), None)


def _common_length(rows: Mapping[str, _Rows], where: str) -> int:
    counts = {name: r.count for name, r in rows.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{where}: the inputs have different numbers of samples: {counts}")
    return next(iter(counts.values()), 0)


def _stream(stream: Any, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any], rows: _Rows) -> Iterator[Array]:
    if fortran or rows.size < 0:
        whole = np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")
        for i in range(rows.count):
            yield np.array(whole[rows.item(i)])
        return
    item = shape[1:] if rows.size == 0 else (rows.size, *shape[1:])
    length = int(np.prod(item, dtype=np.int64)) * dtype.itemsize
    for _ in range(rows.count):
        buffer = stream.read(length)
        if len(buffer) < length:
            raise EOFError("the file is truncated")
        yield np.frombuffer(buffer, dtype).reshape(item)


def _from_protobuf(folder: Path, inputs: tuple[TensorSpec, ...]) -> Feed:
    feed = {}
    for i, file in enumerate(sorted(folder.glob("input_*.pb"), key=lambda f: int(f.stem.split("_")[1]))):
        try:
            tensor = onnx.load_tensor(str(file))
        except Exception as error:
            raise DataError(f"{file} is not an ONNX tensor: {error}") from error
        name = tensor.name or (inputs[i].name if i < len(inputs) else file.stem)
        feed[name] = onnx.numpy_helper.to_array(tensor)
    return feed


def _random(inputs: tuple[TensorSpec, ...], seed: int) -> Iterator[Feed]:
    random = np.random.default_rng(seed)
    while True:
        feed = {}
        for spec in inputs:
            if spec.shape is None:
                raise DataError(f"input {spec.name!r} has no known rank; random data cannot be made for it")
            shape = tuple(d if isinstance(d, int) else 1 for d in spec.shape)
            if spec.dtype.kind == "f":
                feed[spec.name] = random.standard_normal(shape).astype(spec.dtype)
            elif spec.dtype.kind == "b":
                feed[spec.name] = random.random(shape) < 0.5
            else:
                feed[spec.name] = random.integers(0, 2, shape).astype(spec.dtype)
        yield feed
