"""Export of a PyTorch module to ONNX, with proof that the ONNX model computes what the module computes."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxcomp.calibrate import Runner
from onnxcomp.data import load_function
from onnxcomp.errors import DataError, GraphError
from onnxcomp.model import name_nodes, save
from onnxcomp.select import module_paths
from onnxcomp.target import Array, Feed

if TYPE_CHECKING:
    import torch

_INSTALL = "pip install 'onnxcomp[export]'"

_SCOPES = "pkg.torch.onnx.name_scopes"

_KEPT = frozenset({_SCOPES, "pkg.torch.onnx.class_hierarchy"})
"""Metadata of nodes and values that stays. The rest is long and holds paths of the machine that exported."""

_NOISE = ("torch.onnx._internal.exporter._registration", "torch.onnx._internal.exporter._compat", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: The ONNX file.
        nodes: Number of its nodes.
        opset: Its opset.
        max_error: Largest absolute difference from the module's outputs; None if it was not checked.
    """

    path: Path
    nodes: int
    opset: int
    max_error: float | None


def export_module(
    factory: str | torch.nn.Module,
    out: Path,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    opset: int = 20,
    dynamic_batch: bool = False,
    check: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    runner: Runner | None = None,
) -> ExportResult:
    """Exports a module with PyTorch's dynamo exporter.

    Nodes keep the path of the module that they come from, so that `onnxcomp.select.Select(module=...)` finds them. The
    module is exported as for inference (`eval`); its own mode is restored. The outputs are compared on the example
    inputs and on seeded noise of their shape (examples are often zeros); nothing is written if they differ.

    Args:
        factory: A module, or `module:function` that returns a module and its example inputs.
        out: The file to write.
        example_inputs: One tensor an input of `forward`; needed with a module, and goes before what a factory returns.
        opset: The opset to export to.
        dynamic_batch: Leaves the first dimension of every input open. It is then checked at two batch sizes.
        check: Compares the outputs of the ONNX model with those of the module.
        input_names: Names of the inputs; by default those of the parameters of `forward`.
        output_names: Names of the outputs; by default the exporter's.
        rtol: Allowed difference relative to the largest magnitude in an output.
        atol: Allowed absolute difference, added to the relative one.
        runner: Runs the ONNX model; needed with `check`.

    Raises:
        GraphError: If PyTorch is missing, the factory is wrong, the export fails, or the outputs differ.
    """
    if check and runner is None:
        raise GraphError("checking an export needs a runner: give one, or check=False")
    torch = _torch()
    module, inputs = _resolve(factory, example_inputs)
    _check_names(input_names, len(inputs), "inputs")
    if dynamic_batch:
        inputs = _batches(inputs, 2)  # the exporter takes a dimension of 1 for a constant
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            model = _export(module, inputs, opset, dynamic_batch, input_names, output_names)
            _check_names(output_names, len(model.graph.outputs), "outputs")
            error = None
            if check and runner is not None:
                error = _check(module, model, list(_probes(inputs, dynamic_batch)), runner, rtol, atol)
    finally:
        for m in training:
            m.training = True
    save(model, out)
    return ExportResult(path=Path(out), nodes=sum(1 for _ in model.graph.all_nodes()), opset=opset, max_error=error)


def _check_names(names: Sequence[str] | None, count: int, what: str) -> None:
    if names is not None and len(names) != count:
        raise GraphError(f"{len(names)} names were given for {count} {what}: {list(names)}")


def _torch() -> Any:
    try:
        import torch
        import torch.onnx
    except ImportError as error:
        raise GraphError(f"exporting a PyTorch module needs PyTorch ({error}): {_INSTALL}") from error
    if importlib.util.find_spec("onnxscript") is None:
        raise GraphError("PyTorch's exporter needs onnxscript: pip install onnxscript")
    return torch


def _resolve(
    factory: str | torch.nn.Module, example_inputs: tuple[Any, ...] | None
) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    import torch

    if isinstance(factory, str):
        module, inputs = _call(factory)
        inputs = inputs if example_inputs is None else example_inputs
    elif example_inputs is None:
        raise GraphError("exporting a module needs example inputs: one tensor an input of its forward function")
    else:
        module, inputs = factory, example_inputs
    where = repr(factory) if isinstance(factory, str) else "export"
    if not isinstance(module, torch.nn.Module):
        raise GraphError(f"{where} has to give a torch.nn.Module, not {type(module).__name__}")
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list)) or not inputs:
        raise GraphError(f"{where}: example inputs have to be a tuple of tensors, not {type(inputs).__name__}")
    for i, tensor in enumerate(inputs):
        if not isinstance(tensor, torch.Tensor):
            raise GraphError(f"{where}: example input {i} is a {type(tensor).__name__}, not a tensor")
    return module, tuple(inputs)


def _call(factory: str) -> tuple[Any, Any]:
    try:
        function = load_function(factory)
    except DataError as error:
        raise GraphError(f"the factory is not to be had: {error}") from error
    try:
        result = function()
    except Exception as error:
        raise GraphError(f"the factory {factory!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise GraphError(
            f"the factory {factory!r} has to return a module and a tuple of example inputs, not {type(result).__name__}"
        )
    return result[0], result[1]


def _export(
    module: torch.nn.Module,
    inputs: tuple[Any, ...],
    opset: int,
    dynamic_batch: bool,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    import torch

    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=None if input_names is None else list(input_names),
                output_names=None if output_names is None else list(output_names),
                dynamic_shapes=tuple({0: "batch"} for _ in inputs) if dynamic_batch else None,
            )
    except Exception as error:  # what the exporter lets through has no common root
        how = " with an open batch dimension" if dynamic_batch else ""
        raise GraphError(f"PyTorch cannot export {type(module).__name__}{how}: {_reason(error)}") from error
    if program is None:
        raise GraphError(f"PyTorch exported nothing for {type(module).__name__}")
    model: ir.Model = program.model
    if model.opset_imports.get("") != opset:
        raise GraphError(f"PyTorch cannot export {type(module).__name__} to opset {opset}; 18 to 20 are a safe choice")
    if dynamic_batch:
        for value in model.graph.inputs:
            if value.shape is None or not len(value.shape) or isinstance(value.shape[0], int):
                raise GraphError(f"the module takes only one batch size: input {value.name!r} stays {value.shape}")
    _clean(model)
    _restore_modules(model, {name for name, _ in module.named_modules()})
    name_nodes(model)
    return model


def _reason(error: BaseException) -> str:
    """The deepest cause: the exporter wraps it in advice on reporting."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about torchvision and its own deprecations."""
    loggers = [logging.getLogger(name) for name in _NOISE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _clean(model: ir.Model) -> None:
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        for properties in (node.metadata_props, *(v.metadata_props for v in node.outputs)):
            for key in [k for k in properties if k not in _KEPT]:
                del properties[key]


def _restore_modules(model: ir.Model, modules: set[str]) -> None:
    """Adds the module that owns the weight where the exporter left only the module whose nodes it folded in.

    A Conv into which a BatchNormalization was folded is recorded as the latter's only. The exporter names weights after
    their module; a weight read by several nodes proves nothing, as equal weights are merged.
    """
    for node in model.graph:
        paths = module_paths(node)
        if not paths or len(node.inputs) < 2 or (weight := node.inputs[1]) is None or not weight.is_initializer():
            continue
        owner = (weight.name or "").rpartition(".")[0]
        if owner in modules and owner and owner not in paths and len(weight.uses()) == 1:
            *scopes, operation = ast.literal_eval(node.metadata_props[_SCOPES])
            node.metadata_props[_SCOPES] = repr([*scopes[:-1], owner, scopes[-1], operation])


def _batches(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    import torch

    for i, tensor in enumerate(inputs):
        if not tensor.ndim:
            raise GraphError(f"example input {i} is a scalar and has no batch dimension")
    return tuple(torch.cat([t] * -(-size // max(1, len(t))))[: max(size, len(t))] for t in inputs)


def _probes(inputs: tuple[Any, ...], dynamic_batch: bool) -> Iterator[tuple[Any, ...]]:
    """The example inputs, and noise of their shape; integers stay, as they may be indices."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def noise(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t for t in tensors
        )

    yield inputs
    yield noise(inputs)
    if dynamic_batch:
        yield noise(_batches(inputs, len(inputs[0]) + 1))


def _check(
    module: torch.nn.Module,
    model: ir.Model,
    probes: Sequence[tuple[Any, ...]],
    runner: Runner,
    rtol: float,
    atol: float,
) -> float:
    names = [str(v.name) for v in model.graph.outputs]
    run = runner(model, list(dict.fromkeys(names)))
    feeds = [str(v.name) for v in model.graph.inputs]
    largest = 0.0
    for probe in probes:
        if len(feeds) != len(probe):
            raise GraphError(f"the exported model has the inputs {feeds}, the module {len(probe)}")
        feed: Feed = {n: t.detach().cpu().numpy() for n, t in zip(feeds, probe, strict=True)}
        expected = list(_tensors(module(*(t.clone() for t in probe))))
        if len(expected) != len(names):
            raise GraphError(f"the exported model has {len(names)} outputs, the module {len(expected)}")
        found = run(feed)
        for name, tensor in zip(names, expected, strict=True):
            largest = max(largest, _difference(name, tensor.detach().cpu().numpy(), found[name], rtol, atol))
    return largest


def _difference(name: str, expected: Array, found: Array, rtol: float, atol: float) -> float:
    if expected.shape != found.shape:
        raise GraphError(f"output {name!r} is {found.shape} in the exported model, {expected.shape} in the module")
    if not expected.size:
        return 0.0
    e, f = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(e)
    if not np.array_equal(e[~finite], f[~finite], equal_nan=True):
        raise GraphError(f"output {name!r} of the exported model is not finite where the module's is, or the reverse")
    if not finite.any():
        return 0.0
    error = float(np.abs(e - f, where=finite, out=np.zeros(e.shape)).max())
    limit = atol + rtol * float(np.abs(e[finite]).max())
    if not error <= limit:  # NaN is no match either
        raise GraphError(
            f"output {name!r} of the exported model is off by {error:.3g}; {limit:.3g} is allowed. The exporter changed"
            " what the module computes (a branch on data, randomness?), or rtol and atol are too tight for it"
        )
    return error


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)
    elif value is not None:
        raise GraphError(f"the module returns a {type(value).__name__}, not tensors")
