"""The verb that tells what quantizing each linear op, or each block of them, alone costs and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcomp.data import Source, load_data
from onnxcomp.errors import OnnxcompError
from onnxcomp.opset import raise_opset
from onnxcomp.passes._groups import groups
from onnxcomp.passes._jacobian import Jacobian
from onnxcomp.passes._sensitivity import Trials, decibels
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Progress
from onnxcomp.specs import input_specs
from onnxcomp.verbs.resolve import ModelLike, Shapes, load_model, make_target, node_microseconds, pipeline_of
from onnxcomp.verbs.results import GroupImpact, Impact, LayerImpact


def sensitivity(
    model: ModelLike,
    *,
    data: Source,
    target: str = "ort-cpu",
    quantize: Quantize | None = None,
    samples: int = 32,
    compared: int = 8,
    measure: bool = True,
    threads: int = 1,
    seed: int = 0,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> Impact:
    """Quantizes each linear op of a model alone and tells what the outputs lose and how much time the op saves.

    The model is cleaned up first. The error of an op is that of the model's outputs, so what later layers amplify or
    forgive is in it. The same is told of blocks of ops, by the scopes in their names.

    Args:
        model: Path or model; a model in memory is left unchanged.
        data: Calibration data; outputs are compared on some of it.
        target: Whose capabilities decide what is quantized, and on which times are measured.
        quantize: How ops are quantized; the defaults of the pass if None.
        samples: Most calibration feeds to use.
        compared: Feeds that outputs are compared on.
        measure: Whether to measure times.
        threads: Threads a run.
        seed: Of everything random.
        shapes: Fixes dynamic input shapes.
        progress: Told about every layer.

    Raises:
        OnnxcompError: If anything is wrong with what was given, or nothing can be quantized.
    """
    chosen = make_target(target)
    original = load_model(model, shapes)
    cleaned = original.clone() if isinstance(model, ir.Model) else original
    pipeline = pipeline_of([Cleanup()], chosen, "graph", seed, threads)
    feeds = pipeline.samples(original, load_data(data, input_specs(original), seed=seed).take(samples))
    assert feeds is not None
    pipeline.run(cleaned)
    raise_opset(cleaned, Quantize.min_opset)
    trials = Trials(
        model=cleaned, context=pipeline.context(feeds), step=quantize or Quantize(), samples=min(compared, samples)
    )
    nodes = trials.linears()
    if not nodes:
        reasons = sorted({edit.detail for edit in trials.refusals()})
        raise OnnxcompError(f"the model has no linear op that can be quantized ({'; '.join(reasons) or 'none at all'})")
    whole = trials.without(())
    error, flips = trials.difference(whole)
    sample = next(iter(feeds))
    before, after = (node_microseconds(m, chosen, sample, threads) if measure else {} for m in (cleaned, whole))
    jacobian = Jacobian(trials, nodes)
    layers: list[LayerImpact] = []
    weighted: dict[str, float] = {}
    for number, node in enumerate(nodes):
        if progress:
            progress("sensitivity", number, len(nodes))
        name = node.name or ""
        alone = trials.only((name,))
        weighted[name] = jacobian.error(node, alone)
        lost, moved = trials.difference(alone)
        layers.append(
            LayerImpact(
                node=name,
                op_type=node.op_type,
                sqnr=decibels(lost),
                flips=moved,
                weighted_sqnr=decibels(weighted[name]),
                float_microseconds=before.get(name),
                integer_microseconds=after.get(name),
            )
        )
    blocks = groups(nodes)
    blocks = blocks if len(blocks) < len(nodes) else {}  # each op a block of its own would say the same again
    found = [_group(name, part, trials, weighted, before, after) for name, part in blocks.items()]
    return Impact(
        target=target,
        samples=trials.samples,
        sqnr=decibels(error),
        flips=flips,
        layers=tuple(sorted(layers, key=lambda layer: layer.sqnr)),
        groups=tuple(sorted(found, key=lambda group: group.sqnr)),
    )


def _group(
    name: str,
    nodes: Sequence[ir.Node],
    trials: Trials,
    weighted: Mapping[str, float],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> GroupImpact:
    names = [node.name or "" for node in nodes]
    error, flips = trials.difference(trials.only(names))
    timed = [n for n in names if n in before and n in after]
    return GroupImpact(
        name=name,
        layers=len(names),
        sqnr=decibels(error),
        flips=flips,
        weighted_sqnr=decibels(sum(weighted[n] for n in names)),
        float_microseconds=sum(before[n] for n in timed) if timed else None,
        integer_microseconds=sum(after[n] for n in timed) if timed else None,
    )
