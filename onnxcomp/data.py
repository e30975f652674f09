"""Sample data: feeds from files, folders, or Python functions, streamed one at a time and checked against the model."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxcomp.errors import DataError, OnnxcompError
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

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in itertools.islice(self.open(), self.start, self.stop))

    def digests(self) -> list[bytes]:
        """A hash of every feed, to find feeds that occur twice."""
        return [_digest(feed) for feed in self]

    def split(self, samples: int | None, eval_samples: int | None = None) -> tuple[Data, Data]:
        """Splits into calibration and evaluation data that share no feed.

        The first half calibrates, the second half evaluates. Neighbouring feeds are often alike (crops of one picture,
        frames of one video), so halves are kept together. With both limits given, no more feeds than needed are read.
        A single feed serves as both, and `seen_by_calibration` is set.

        Args:
            samples: Most feeds to calibrate with, None for all of the half.
            eval_samples: Most feeds to evaluate on, likewise.

        Raises:
            DataError: If there is no feed.
        """
        used = self if samples is None or eval_samples is None else self.take(2 * max(samples, eval_samples))
        total = len(used)
        if total == 0:
            raise DataError(f"{self.name} is empty")
        if total == 1:
            return used, replace(used, seen_by_calibration=True)
        middle = self.start + total // 2
        return replace(used, stop=middle).take(samples), replace(used, start=middle).take(eval_samples)


def _digest(feed: Feed) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(feed):
        array = np.asarray(feed[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
    return digest.digest()


def load_data(source: Source, inputs: Sequence[TensorSpec], *, seed: int = 0) -> Data:
    """Opens sample data.

    Args:
        source: One of: a `.npz` file, one array an input (first axis: samples; a scalar input goes into every feed); a
            folder of such `.npz` files, of `.npy` files (one array an input, named as the input), or of ONNX
            `test_data_set_*` folders; such a `test_data_set_*` folder; `module:function`, which returns an iterable of
            feeds; `random`, for smoke tests; a callable or a re-iterable of feeds.
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
    except Exception as error:  # a module may raise anything while it is imported
        reason = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise DataError(f"module {module_name!r} of {text!r} cannot be imported: {reason}") from error
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
        try:
            array = np.asarray(feed[spec.name])
        except ValueError as error:  # a list of arrays of different shapes
            raise DataError(f"{where}: input {spec.name!r} is no array; sequences cannot be fed") from error
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
    except OnnxcompError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise DataError(
            f"{text} has to be callable without arguments and return feeds; it raised {type(error).__name__}: {error}"
        ) from error


def _opener(path: Path, inputs: tuple[TensorSpec, ...]) -> Callable[[], Iterator[Feed]]:
    if path.is_file():
        if path.suffix == ".npz":
            return lambda: _from_npz(path, inputs)
        if path.suffix == ".npy" and len(inputs) == 1:
            return lambda: _from_arrays({inputs[0].name: path}, inputs)
        raise DataError(f"{path}: expected a .npz file{'' if len(inputs) == 1 else ' (the model has several inputs)'}")
    if sets := sorted(path.glob("test_data_set_*"), key=_number):
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
    arrays = {name: _mapped(file) for name, file in files.items()}
    rows = {k: _rows(a.shape, _spec(inputs, k, files[k]), str(files[k])) for k, a in arrays.items()}
    for i in range(_common_length(rows, ", ".join(map(str, files.values())))):
        yield {k: np.array(a[rows[k].item(i)]) for k, a in arrays.items()}


def _mapped(file: Path) -> Array:
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:  # Python objects are among the ValueErrors
        raise DataError(f"{file} cannot be read: {error}") from error


def _from_npz(path: Path, inputs: tuple[TensorSpec, ...]) -> Iterator[Feed]:
    """Decompresses every member as a stream, so that one feed is in memory and not the archive."""
    try:
        with zipfile.ZipFile(path) as archive, ExitStack() as streams:
            rows: dict[str, _Rows] = {}
            readers: dict[str, Iterator[Array]] = {}
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                spec = _spec(inputs, name, path)
                stream = streams.enter_context(archive.open(member))
                shape, fortran, dtype = _npy_header(stream)
                if dtype.hasobject:
                    raise DataError(f"{path}: {name!r} holds Python objects, which are not read")
                rows[name] = _rows(shape, spec, str(path))
                readers[name] = _stream(stream, shape, fortran, dtype, rows[name])
            for _ in range(_common_length(rows, str(path))):
                yield {name: next(reader) for name, reader in readers.items()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        # RuntimeError: it is encrypted, or compressed in a way that Python does not know
        raise DataError(f"{path} cannot be read: {error}") from error


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


@dataclass(frozen=True)
class _Rows:
    """How an array of samples is cut into feeds: `count` of `size` rows each.

    Size 0 drops the axis; -1 takes the whole array into every feed.
    """

    count: int
    size: int

    def item(self, i: int) -> Any:
        if self.size < 0:
            return ...
        return i if self.size == 0 else slice(i * self.size, (i + 1) * self.size)


def _rows(shape: tuple[int, ...], spec: TensorSpec, where: str) -> _Rows:
    if spec.shape is None or not (shape or spec.shape):
        return _Rows(1, -1)
    if len(shape) == len(spec.shape) + 1:
        return _Rows(shape[0], 0)
    batch = spec.shape[0] if spec.shape else None
    size = batch if isinstance(batch, int) and batch > 0 else 1
    if len(shape) != len(spec.shape) or 0 < shape[0] < size:
        raise DataError(
            f"{where}: input {spec.name!r} has shape {_text(shape)}; the model expects {_text(spec.shape)}, or that "
            "with an axis of samples before it"
        )
    return _Rows(shape[0] // size, size)


def _spec(inputs: Sequence[TensorSpec], name: str, where: Path) -> TensorSpec:
    for spec in inputs:
        if spec.name == name:
            return spec
    raise DataError(f"{where}: the model has no input {name!r}; its inputs are {sorted(i.name for i in inputs)}")


def _common_length(rows: Mapping[str, _Rows], where: str) -> int:
    counts = {name: r.count for name, r in rows.items() if r.size >= 0}
    if len(set(counts.values())) > 1:
        raise DataError(f"{where}: the inputs have different numbers of samples: {counts}")
    return next(iter(counts.values()), 1 if rows else 0)


def _stream(stream: Any, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any], rows: _Rows) -> Iterator[Array]:
    if fortran or rows.size < 0:
        whole = np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")
        yield from (np.array(whole[rows.item(i)]) for i in (range(rows.count) if rows.size >= 0 else itertools.count()))
        return
    item = shape[1:] if rows.size == 0 else (rows.size, *shape[1:])
    length = int(np.prod(item, dtype=np.int64)) * dtype.itemsize
    for _ in range(rows.count):
        buffer = stream.read(length)
        if len(buffer) < length:
            raise EOFError("the file is truncated")
        yield np.frombuffer(buffer, dtype).reshape(item)


def _from_protobuf(folder: Path, inputs: tuple[TensorSpec, ...]) -> Feed:
    """Tensors go by their name, and by the number of their file where the model has no input of that name."""
    names = [i.name for i in inputs]
    feed = {}
    for i, file in enumerate(sorted(folder.glob("input_*.pb"), key=_number)):
        try:
            tensor = onnx.load_tensor(str(file))
            array = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # protobuf and onnx raise many kinds
            raise DataError(f"{file} is not an ONNX tensor: {error}") from error
        feed[names[i] if tensor.name not in names and i < len(names) else tensor.name] = array
    return feed


def _number(path: Path) -> tuple[int, str]:
    """Sorts `input_10.pb` behind `input_9.pb`."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdecimal() else -1, path.name)


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
            elif spec.dtype.kind in "iu":
                feed[spec.name] = random.integers(0, 2, shape).astype(spec.dtype)
            else:
                raise DataError(f"input {spec.name!r} is {spec.dtype}; random data cannot be made for it")
        yield feed
