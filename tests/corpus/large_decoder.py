"""Writes a decoder as large as wanted, quantizes it in a process of its own, and says what memory that took.

python -m tests.corpus.large_decoder [--gib 4] [--recipes weight_only8 weight_only4] [--folder FOLDER]

The weights are drawn at random and lie in an external file; the graph has the shape of a Llama without a cache. Three
figures are told apart: the peak of resident memory (VmHWM), in which mapped pages of files count, and the peaks of
anonymous memory (RssAnon) and of mapped pages (RssFile), sampled 50 times a second.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

WIDTH, HIDDEN, HEADS, VOCABULARY = 2048, 5632, 16, 32000

RUN = """
import resource, sys
from onnxcomp.api import rewrite
rewrite(sys.argv[1], sys.argv[2], recipe=sys.argv[3])
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_utime + usage.ru_stime)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def write_decoder(path: Path, gib: float) -> int:
    """Writes a decoder of at least `gib` GiB of weights at `path`, its weights beside it in `weights.bin`.

    Returns:
        Bytes of weights.
    """
    layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)
    tables = 2 * 4 * VOCABULARY * WIDTH
    layers = max(1, -int(-(gib * 2**30 - tables) // layer))
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []
    random = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32) / 45
    with path.with_name("weights.bin").open("wb") as file:

        def weight(name: str, *sizes: int) -> str:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=sizes, data_location=TensorProto.EXTERNAL)
            count = int(np.prod(sizes))
            entries = {"location": "weights.bin", "offset": str(file.tell()), "length": str(4 * count)}
            for key, text in entries.items():
                tensor.external_data.add(key=key, value=text)
            for start in range(0, count, random.size):
                file.write(random[: count - start].tobytes())
            weights.append(tensor)
            return name

        def op(kind: str, name: str, *inputs: str, **attributes: object) -> str:
            nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
            return name

        for name, values in (("split", [0, 0, HEADS, WIDTH // HEADS]), ("join", [0, 0, WIDTH])):
            weights.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        x = op("Gather", "embed", weight("embed.weight", VOCABULARY, WIDTH), "ids")
        for i in range(layers):
            x = _block(f"layers.{i}", x, op, weight)
        op("MatMul", "logits", x, weight("head.weight", WIDTH, VOCABULARY))
        total = file.tell()
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "t"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "t", VOCABULARY])
    graph: GraphProto = helper.make_graph(nodes, "decoder", [ids], [logits], weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    return total


def _block(name, x, op, weight):  # type: ignore[no-untyped-def] # closures of the writer
    """Attention over all positions, and a gated MLP."""
    y = op("LayerNormalization", f"{name}.norm1", x, weight(f"{name}.gamma1", WIDTH))
    heads = []
    for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        z = op("MatMul", f"{name}.{part}", y, weight(f"{name}.{part}.weight", WIDTH, WIDTH))
        z = op("Reshape", f"{name}.{part}.split", z, "split")
        heads.append(op("Transpose", f"{name}.{part}.heads", z, perm=order))
    scores = op("Softmax", f"{name}.softmax", op("MatMul", f"{name}.scores", *heads[:2]), axis=-1)
    y = op("Transpose", f"{name}.tokens", op("MatMul", f"{name}.mixed", scores, heads[2]), perm=[0, 2, 1, 3])
    y = op("Reshape", f"{name}.joined", y, "join")
    x = op("Add", f"{name}.sum1", x, op("MatMul", f"{name}.out", y, weight(f"{name}.out.weight", WIDTH, WIDTH)))
    y = op("LayerNormalization", f"{name}.norm2", x, weight(f"{name}.gamma2", WIDTH))
    gate = op("MatMul", f"{name}.gate", y, weight(f"{name}.gate.weight", WIDTH, HIDDEN))
    up = op("MatMul", f"{name}.up", y, weight(f"{name}.up.weight", WIDTH, HIDDEN))
    gate = op("Mul", f"{name}.silu", gate, op("Sigmoid", f"{name}.sigmoid", gate))
    y = op("Mul", f"{name}.gated", gate, up)
    return op("Add", f"{name}.sum2", x, op("MatMul", f"{name}.down", y, weight(f"{name}.down.weight", HIDDEN, WIDTH)))


def measure(source: Path, result: Path, recipe: str) -> Mapping[str, float]:
    """Rewrites a model in a process of its own.

    Returns:
        Peaks in MB (`VmHWM`, `RssAnon`, `RssFile`), `seconds` and seconds of processors (`cpu`).
    """
    started = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(source), str(result), recipe]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peaks: dict[str, float] = {}
        while process.poll() is None:
            for key, value in _sizes(process.pid):
                peaks[key] = max(peaks.get(key, 0.0), value)
            time.sleep(0.02)
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{recipe} failed")
    cpu, peak = text.split()[-2:]
    return peaks | {"VmHWM": int(peak) / 1000, "seconds": time.perf_counter() - started, "cpu": float(cpu)}


def _sizes(pid: int) -> Iterator[tuple[str, float]]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return
    for line in lines:
        if line.startswith(("RssAnon", "RssFile")):
            yield line.split(":")[0], int(line.split()[1]) / 1000


def main() -> None:
    """Prints a line for each recipe and removes what was written."""
    parser = argparse.ArgumentParser(prog="python -m tests.corpus.large_decoder", description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0, help="GiB of weights at least")
    parser.add_argument("--recipes", nargs="+", default=["weight_only8", "weight_only4"])
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="large_decoder.", dir=options.folder))
    try:
        source, result = folder / "decoder.onnx", folder / "result.onnx"
        print(f"{write_decoder(source, options.gib) / 2**30:.2f} GiB of weights", flush=True)
        for recipe in options.recipes:
            found = measure(source, result, recipe)
            written = sum(f.stat().st_size for f in folder.glob("result.onnx*")) / 1e6
            peaks = ", ".join(f"{key} {found[key]:.0f} MB" for key in ("VmHWM", "RssAnon", "RssFile"))
            times = f"{found['seconds'] / 60:.1f} minutes ({found['cpu'] / 60:.1f} of processors)"
            print(f"{recipe}: {peaks}, {times}, result {written:.0f} MB", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
