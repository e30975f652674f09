"""The commands that measure a model and show figures; `onnxcomp.cli` gives them their places among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxcomp import cli_devices, cli_render, cli_sparsity, cli_streams
from onnxcomp.cli_gates import Gate, fail
from onnxcomp.cli_options import (
    CalibrationData,
    Compared,
    DataSource,
    DeviceName,
    Feeds,
    Inputs,
    Json,
    MaxRise,
    Measure,
    MeasurePerplexity,
    MetricName,
    Model,
    OneFeed,
    OwnTarget,
    Samples,
    Seed,
    SomeSamples,
    SomeTokens,
    SparsityPage,
    Stream,
    StreamPage,
    Stride,
    TailError,
    TargetName,
    Threads,
    Timing,
    Tokens,
    Window,
    grouped,
    shapes,
)
from onnxcomp.cli_render import working
from onnxcomp.errors import RecipeError


def sensitivity(
    model: Model,
    *,
    data: CalibrationData,
    target: TargetName = "ort-cpu",
    samples: Samples = 32,
    compared: Compared = 8,
    measure: Measure = True,
    threads: Threads = 1,
    seed: Seed = 0,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Quantize each linear op alone, and show what the outputs lose and what time the op saves."""
    from onnxcomp import api

    cli_render.warn_of_random(data)
    with working(as_json) as progress:
        result = api.sensitivity(
            model, data=data, target=target, samples=samples, compared=compared, measure=measure, threads=threads,
            seed=seed, shapes=shapes(inputs), progress=progress,
        )  # fmt: skip
    cli_render.sensitivity(result, as_json)


def sparsity(
    model: Model,
    *,
    data: DataSource = None,
    tokens: SomeTokens = None,
    window: Window = 256,
    samples: Samples = 32,
    cett: TailError = 0.2,
    measure: MeasurePerplexity = True,
    report: SparsityPage = None,
    seed: Seed = 0,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Show how sparse activations are, what dropping small ones costs, and which method pays."""
    from onnxcomp import api
    from onnxcomp.verbs.sparsity_page import check_page

    if report is not None:
        check_page(report)
    cli_render.warn_of_random(data)
    with working(as_json) as progress:
        result = api.sparsity(
            model, data=data, tokens=tokens, window=window, samples=samples, cett=cett, measure=measure, seed=seed,
            shapes=shapes(inputs), progress=progress,
        )  # fmt: skip
    cli_sparsity.sparsity(result, as_json)
    if report is not None:
        api.write_sparsity_page(result, report, model=model.name, data=tokens or data or "")
        if not as_json:
            typer.echo(f"report: {report}")


def perplexity(
    model: Model,
    *,
    tokens: Tokens,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="Compared on the same tokens.")] = None,
    window: Window = 512,
    stride: Stride = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Most tokens to use.")] = None,
    target: TargetName = "ort-cpu",
    threads: Threads = 1,
    inputs: Inputs = None,
    max_rise: MaxRise = None,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a decoder on tokens, as it runs on the target."""
    from onnxcomp import api

    if max_rise is not None and baseline is None:
        raise RecipeError("--max-rise is a rise over another model; give it with --baseline")
    with working(as_json) as progress:
        result = api.perplexity(
            model, tokens=tokens, baseline=baseline, window=window, stride=stride, limit=limit, target=target,
            threads=threads, shapes=shapes(inputs), progress=progress,
        )  # fmt: skip
    cli_sparsity.perplexity(result, as_json)
    if max_rise is not None and result.rise is not None and not result.rise <= max_rise:
        fail(f"perplexity rises by {result.rise:.2%}, more than --max-rise {max_rise:g}")


def calibrate_target(
    model: Annotated[
        Path | None, typer.Argument(help="Its products are measured, else those of common shapes.")
    ] = None,
    target: TargetName = "ort-cpu",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Measure from which sparsity on the target's sparse kernels pay on this machine, for later rewrites."""
    from onnxcomp import api

    with working(as_json) as progress:
        result = api.calibrate_target(target, model, threads=threads, progress=progress)
    cli_render.break_even(result, as_json)


@grouped
def profile(
    model: Annotated[Path, typer.Argument(help="An .onnx file or the folder of an artifact.")],
    *,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="Measured interleaved with the model.")] = None,
    target: OwnTarget = None,
    data: OneFeed = "random",
    stream: Stream = False,
    samples: SomeSamples = None,
    plot: StreamPage = None,
    device: DeviceName = None,
    timing: Timing,
    seed: Seed = 0,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Measure latency, memory and time by node on the target, or the steps of a stream."""
    from onnxcomp import api
    from onnxcomp.verbs.sparsity_page import check_page

    if not stream and (plot is not None or samples is not None):
        raise RecipeError("--plot and --samples are for a stream; give --stream as well")
    if plot is not None:
        check_page(plot)
    if device is not None:
        if stream or baseline is not None:
            raise RecipeError("--stream and --baseline are for this machine; a device runs one model on one feed")
        with working(as_json):
            measured = api.profile(
                model, device=device, target=target, data=data, **timing.keywords(), seed=seed, shapes=shapes(inputs)
            )
        cli_devices.device_profile(measured, as_json)
        return
    if stream:
        with working(as_json) as progress:
            found = api.profile_stream(
                model, baseline, target=target, data=data, samples=samples, **timing.keywords(),
                shapes=shapes(inputs), progress=progress,
            )  # fmt: skip
        cli_streams.stream_profile(found, as_json)
        if plot is not None:
            api.write_stream_page(found, plot, model=model.name)
            if not as_json:
                typer.echo(f"plot: {plot}")
        return
    with working(as_json) as progress:
        result = api.profile(
            model, baseline, target=target, data=data, **timing.keywords(), seed=seed, shapes=shapes(inputs),
            progress=progress,
        )  # fmt: skip
    cli_render.profile(result, as_json)


@grouped
def compare(
    reference: Annotated[Path, typer.Argument(help="The original.")],
    other: Annotated[Path, typer.Argument(help="The model in question.")],
    *,
    data: Feeds,
    metric: MetricName = None,
    target: TargetName = "ort-cpu",
    samples: SomeSamples = None,
    threads: Threads = 1,
    seed: Seed = 0,
    inputs: Inputs = None,
    gate: Gate,
    as_json: Json = False,
) -> None:
    """Compare the outputs and layers of two models on data."""
    from onnxcomp import api

    cli_render.warn_of_random(data)
    with working(as_json) as progress:
        fidelity = api.compare(
            reference, other, data=data, metric=metric, target=target, samples=samples, threads=threads, seed=seed,
            shapes=shapes(inputs), require_drop=gate.max_drop is not None, progress=progress,
        )  # fmt: skip
    cli_render.fidelity(fidelity, as_json)
    gate.hold(fidelity)
