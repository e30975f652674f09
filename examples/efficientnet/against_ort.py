"""Static int8 of EfficientNet-Lite0: ours and onnxruntime's own, same pictures, one run.

    python -m examples.efficientnet.against_ort [--rounds 100]

Each quantizer runs in a process of its own, whose CPU seconds and peak memory are taken. Then all models are timed
interleaved on one thread, and compared with the float model on pictures that calibration did not see.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

IMAGES = 32
THREADS = 1


def ours(source: Path, out: Path, data: Path, recipe: str = "int8") -> None:
    """Our recipe `int8`."""
    from onnxcomp import api

    api.rewrite(source, out, recipe=recipe, data=data)


def gptq(source: Path, out: Path, data: Path) -> None:
    """Our recipe `int8_gptq`."""
    ours(source, out, data, "int8_gptq")


def mixed(source: Path, out: Path, data: Path) -> None:
    """Our recipe `int8_mixed`."""
    ours(source, out, data, "int8_mixed")


def onnxruntime_minmax(source: Path, out: Path, data: Path) -> None:
    """Its best settings for this model: uint8 activations, int8 weights per channel, after its preprocessing."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        feeds = iter(np.load(data)["image"])

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.feeds, None)
            return None if image is None else {"image": image[None]}

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def measured(work: Callable[[Path, Path, Path], None], source: Path, out: Path, data: Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of a fresh process that does the work, imports included."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_report, args=(work, source, out, data, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} failed")
    seconds, memory = queue.get()
    return seconds, memory


def _report(work: Callable[[Path, Path, Path], None], source: Path, out: Path, data: Path, queue: object) -> None:
    work(source, out, data)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Not ru_maxrss, which starts with the memory of the process that started this one.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    queue.put((used.ru_utime + used.ru_stime, int(peak.split()[1]) / 1024))  # type: ignore[attr-defined]


def main() -> None:
    """Quantizes, times, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds

    from examples.efficientnet.images import calibration, evaluation
    from onnxcomp import api

    with tempfile.TemporaryDirectory() as folder:
        source, data = Path(folder, "float.onnx"), Path(folder, "calibration.npz")
        images = [feed["image"] for feed in calibration()]
        np.savez(data, image=np.concatenate(images[:: len(images) // IMAGES][:IMAGES]))
        api.export("examples.efficientnet.model:model", source)
        print(f"{'':20} {'cpu s':>6} {'MB peak':>8} {'MB file':>8} {'SQNR dB':>8} {'agree':>6} {'time':>6}  int8 convs")
        for work in (onnxruntime_minmax, ours, gptq, mixed):
            out = Path(folder, f"{work.__name__}.onnx")
            seconds, memory = measured(work, source, out, data)
            found = api.profile(out, source, threads=THREADS, repeat=rounds).ratio
            assert found is not None
            output = api.compare(source, out, data=evaluation, layers=False).outputs[0]
            convs = api.compile(out, Path(folder, "artifact")).audit.executed_ops.get("QLinearConv", 0)
            print(
                f"{work.__name__:20} {seconds:6.2f} {memory:8.0f} {out.stat().st_size / 1e6:8.2f} "
                f"{output.sqnr:8.2f} {output.top1:6.3f} {found.median:6.3f}  {convs}",
                flush=True,
            )


if __name__ == "__main__":
    main()
