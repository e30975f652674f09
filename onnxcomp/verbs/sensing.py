"""The verb that tells what quantizing each linear op alone costs and saves."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.data import Source, load_data
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import input_specs
from onnxcomp.opset import raise_opset
from onnxcomp.passes._sensitivity import Trials, decibels
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Progress
from onnxcomp.verbs.resolve import ModelLike, Shapes, load_model, make_target, node_microseconds, pipeline_of
from onnxcomp.verbs.results import LayerSensitivity, Sensitivity


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
) -> Sensitivity:
    """Quantizes each linear op of a model alone and tells what the outputs lose and how much time the op saves.

    The model is cleaned up first. The error of an op is that of the model's outputs, so what later layers amplify or
    forgive is in it.

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
    feeds = load_data(data, input_specs(original), seed=seed).take(samples)
    pipeline = pipeline_of([Cleanup()], chosen, "graph", seed, threads)
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
    times = [node_microseconds(m, chosen, sample, threads) if measure else {} for m in (cleaned, whole)]
    layers = []
    for number, node in enumerate(nodes):
        if progress:
            progress("sensitivity", number, len(nodes))
        (cost,) = trials.costs([node])
        layers.append(
            LayerSensitivity(
                node=cost.node,
                op_type=cost.op_type,
                sqnr=cost.sqnr,
                flips=cost.flips,
                float_microseconds=times[0].get(cost.node),
                integer_microseconds=times[1].get(cost.node),
            )
        )
    return Sensitivity(
        target=target,
        samples=trials.samples,
        sqnr=decibels(error),
        flips=flips,
        layers=tuple(sorted(layers, key=lambda layer: layer.sqnr)),
    )
