"""Models on disk and in memory: loading, atomic saving, validation, size."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxcomp.errors import GraphError
from onnxcomp.macs import count_macs
from onnxcomp.sanity import make_sane
from onnxcomp.skeleton import merge_types, release, skeleton

EXTERNAL_THRESHOLD = 1_500_000_000
"""Models whose weights exceed this many bytes are saved with external data; protobuf ends at 2 GiB."""

_KEPT_OUTSIDE = 1 << 26
"""Weights above this many bytes stay outside if they were: as one file they would be in memory four times over."""

_NO_MAPS = "which cannot be read; export it without: scikit-learn's classifiers with options={'zipmap': False}"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Size of a model.

    Attributes:
        nodes: Number of nodes, subgraphs and functions included.
        ops: Op type to number of nodes.
        weight_bytes: Bytes of all weights as stored.
        parameters: Number of weight elements.
        macs: Multiply-accumulates of one run as far as shapes are known; 0 if none is.
    """

    nodes: int
    ops: Mapping[str, int]
    weight_bytes: int
    parameters: int
    macs: int


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Loads an ONNX model; external data stays on disk, memory-mapped when it is used.

    Nodes without a name get one, so that selectors, reports and audits can name them. What old files write in another
    way is brought into today's: weights that are listed as inputs as well, sizes of -1, the domain `ai.onnx`.

    Args:
        path: An `.onnx` file.

    Raises:
        GraphError: If the file is missing, is no ONNX model, is truncated, or its external data is missing, too short,
            or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    try:
        model = ir.load(path)
    except (DecodeError, UnicodeDecodeError) as error:
        raise GraphError(f"{path} is not an ONNX model, or it is truncated: {error}") from error
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # onnx_ir raises many kinds for malformed graphs
        if "Map types" in str(root_cause(error)):
            raise GraphError(f"{path} has values of type map, {_NO_MAPS}") from error
        raise GraphError(f"{path} is not a valid ONNX model: {_first_line(root_cause(error))}") from error
    make_sane(model, str(path))
    _check_external_data(model, path)
    _embed_inner(model)
    name_nodes(model)
    return model


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool = False) -> None:
    """Writes a model atomically: a reader sees the old file or the new one, never a part.

    Weights above `EXTERNAL_THRESHOLD` bytes, or 64 MiB if some of them lie on disk already, or if asked, go into
    `<name>.data` beside the model; if the model that is replaced uses that name, into `<name>.1.data`, and the old file
    is removed at the end. So a model may be saved over the file that it was loaded from. Its weights that are still on
    disk are then those of a file that is gone: load it anew.

    Raises:
        GraphError: If the folder does not exist or cannot be written.
    """
    path = Path(path)
    size = weight_bytes(model)
    external = external or size > EXTERNAL_THRESHOLD or (size > _KEPT_OUTSIDE and has_external(model))
    try:
        if not path.parent.is_dir():
            raise GraphError(f"cannot write {path}: there is no folder {path.parent}")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            if external:
                _save_external(model, temporary, path)
            else:
                with _in_memory(model):
                    ir.save(model, temporary)
                os.replace(temporary, path)
    except OSError as error:
        raise GraphError(f"cannot write {path}: {error.strerror or error}") from error
    except ir.serde.SerdeError as error:
        raise GraphError(f"cannot write {path}: {_first_line(root_cause(error))}") from error


def has_external(model: ir.Model) -> bool:
    """Whether some weights of the model are still in a file."""
    return any(isinstance(v.const_value, ir.ExternalTensor | ir.LazyTensor) for v in initializers(model))


def _save_external(model: ir.Model, temporary: Path, path: Path) -> None:
    names = (f"{path.name}.data", f"{path.name}.1.data")
    old = _data_files(path)
    new = next(name for name in names if name not in old)
    ir.save(model, temporary, external_data=new)
    data = path.with_name(new)
    try:
        os.replace(temporary.with_name(new), data)
        os.replace(temporary, path)
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    for name in set(names) & old:
        path.with_name(name).unlink(missing_ok=True)


def _data_files(path: Path) -> set[str]:
    """Names of the files that hold weights of the model at `path`; none if there is no model."""
    try:
        model = ir.load(path)
    except Exception:  # absent, or about to be replaced by a valid one
        return set()
    return {str(t.location) for v in initializers(model) if isinstance(t := v.const_value, ir.ExternalTensor)}


@contextmanager
def _in_memory(model: ir.Model) -> Iterator[None]:
    """Holds weights that are on disk in memory; `onnx_ir` would write down where they were instead."""
    swapped = [(v, t) for v in initializers(model) if isinstance(t := v.const_value, ir.ExternalTensor)]
    try:
        for value, tensor in swapped:
            value.const_value = _loaded(tensor)
        yield
    finally:
        for value, tensor in swapped:
            value.const_value = tensor


def _loaded(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    array = tensor.numpy().copy()
    release(tensor)
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_graph(model: ir.Model) -> None:
    """Validates the model with the ONNX checker, without its weights.

    Raises:
        GraphError: With the checker's first complaint.
    """
    try:
        proto = skeleton(model)
        for value in (*proto.graph.input, *proto.graph.output):
            # The checker wants a type with a shape, which runtimes do without; an unknown one is no fault of the graph.
            if value.type.WhichOneof("value") in (None, "tensor_type"):
                tensor_type = value.type.tensor_type
                tensor_type.elem_type = tensor_type.elem_type or onnx.TensorProto.FLOAT
                tensor_type.shape.SetInParent()
        onnx.checker.check_model(proto)
    except Exception as error:  # what is written and what the checker finds have no common root
        raise GraphError(f"the graph is not valid: {_first_line(root_cause(error))}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings of the libraries that work on graphs: they speak of their own working, not of the model."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def infer_shapes(model: ir.Model) -> None:
    """Fills in types and shapes of values as far as they can be inferred; a failure leaves them as they are."""
    for value in initializers(model):
        if value.const_value is not None:
            value.shape, value.dtype = ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
    try:
        proto = onnx.shape_inference.infer_shapes(skeleton(model), check_type=False, strict_mode=False, data_prop=True)
    except Exception:  # of a custom op, or of a model that runtimes run all the same
        return
    merge_types(model.graph, proto.graph)


def fix_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Gives inputs a static shape and infers the others anew.

    Args:
        model: Changed in place.
        shapes: Input name to shape.

    Raises:
        GraphError: If an input does not exist, has another rank, or a static dimension is contradicted.
    """
    inputs = {v.name: v for v in model.graph.inputs}
    for name, shape in shapes.items():
        value = inputs.get(name)
        if value is None:
            raise GraphError(f"the model has no input {name!r}; it has {sorted(map(str, inputs))}")
        if value.shape is not None:
            if len(value.shape) != len(shape):
                raise GraphError(f"input {name!r} has {len(value.shape)} dimensions, not {len(shape)}")
            for axis, (old, new) in enumerate(zip(value.shape, shape, strict=True)):
                if isinstance(old, int) and 0 <= old != new:
                    raise GraphError(f"input {name!r} has a fixed dimension {old} on axis {axis}, not {new}")
        value.shape = ir.Shape(shape)
    for value in _inner_values(model.graph):
        value.shape = None
    infer_shapes(model)


def graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph and all functions; subgraphs are reached through `all_nodes`."""
    yield model.graph
    yield from model.functions.values()


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, those of subgraphs and functions included."""
    for graph in graphs(model):
        yield from graph.all_nodes()


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """All initializers, those of subgraphs included."""
    yield from model.graph.initializers.values()
    for graph in model.graph.subgraphs():
        yield from graph.initializers.values()


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers as stored."""
    return sum(v.const_value.nbytes for v in initializers(model) if v.const_value is not None)


def model_size(model: ir.Model) -> ModelSize:
    """Counts nodes, weights and multiply-accumulates."""
    ops = Counter(n.op_type for n in all_nodes(model))
    weights = [v.const_value for v in initializers(model) if v.const_value is not None]
    return ModelSize(
        nodes=ops.total(),
        ops=dict(ops.most_common()),
        weight_bytes=sum(w.nbytes for w in weights),
        parameters=sum(w.size for w in weights),
        macs=sum(count_macs(n) for n in model.graph.all_nodes()),
    )


def name_nodes(model: ir.Model) -> None:
    """Gives every node without a name, or with one that is taken, a unique name made of its op type and a number."""
    taken: set[str] = set()
    nameless: list[ir.Node] = []
    for node in all_nodes(model):
        if node.name and node.name not in taken:
            taken.add(node.name)
        else:
            nameless.append(node)
    counters: Counter[str] = Counter()
    for node in nameless:
        base = node.name or node.op_type
        while (candidate := f"{base}_{counters[base]}") in taken:
            counters[base] += 1
        node.name = candidate
        taken.add(candidate)


def _inner_values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph.all_nodes():
        yield from node.outputs


def _check_external_data(model: ir.Model, path: Path) -> None:
    folder = path.resolve().parent
    for tensor in _external_tensors(model):
        what = f"{path}: the file {tensor.location!r} with weight {tensor.name!r}"
        file = Path(tensor.path).resolve()
        if not file.is_relative_to(folder):
            raise GraphError(
                f"{what} lies outside the model's folder; refused, since a model must not read other files. Copy it "
                "there if you trust the model"
            )
        if not file.is_file():
            raise GraphError(f"{what} is missing")
        status = file.stat()
        if status.st_nlink > 1:
            raise GraphError(f"{what} has several hard links; refused, since it may be another file. Copy it")
        start = tensor.offset or 0
        if start < 0 or start + tensor.nbytes > status.st_size:
            raise GraphError(
                f"{what} is truncated: the weight lies at bytes {start} to {start + tensor.nbytes}, the file ends at "
                f"{status.st_size}"
            )


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value
    for _, _, tensor in _external_attributes(model):
        yield tensor


def _external_attributes(model: ir.Model) -> Iterator[tuple[ir.Node, str, ir.ExternalTensor]]:
    for node in all_nodes(model):
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                yield node, name, attribute.value


def _embed_inner(model: ir.Model) -> None:
    """Reads tensors of Constant nodes and weights of subgraphs that lie on disk.

    No writer moves the former along with the model, and a conversion of the opset forgets where the latter lie.
    """
    for node, name, tensor in list(_external_attributes(model)):
        node.attributes[name] = ir.AttrTensor(name, _loaded(tensor))
    for graph in model.graph.subgraphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _loaded(value.const_value)


def root_cause(error: BaseException) -> BaseException:
    """The deepest cause of an exception: what is raised last often only says where."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
