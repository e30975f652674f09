"""What rotations do for a decoder: errors of its weights on 4 bit grids, and perplexity in integer forms.

    python -m examples.llm.rotated MODEL.onnx [--tokens 6144] [--weights]

`--weights` prints relative squared errors of the weights by kind of layer: as they are and turned by `rotate`, rounded
by the range search of onnxcomp, and in blocks of 128 turned by Hadamard matrices on the grid of QuEST (Panferov et al.,
arXiv 2502.05003), whose range is that of a Gaussian.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from examples.llm.gguf import GgufFile
from examples.llm.model import smollm2_weights
from examples.llm.perplexity import perplexity
from examples.llm.session import Decoder, wikitext
from examples.llm.tokenizer import Tokenizer
from onnxcomp.model import load, save
from onnxcomp.passes._hadamard import rotate, rotation
from onnxcomp.passes.dynamic_quantize import DynamicQuantize
from onnxcomp.passes.rotate import Rotate
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.quant import weight_grid
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu

_BLOCK = 128
_ADDED = Select(skip=("*_rotation",))  # MatMuls that rotate adds stay in float
_LAYERS = Select(skip=("*_rotation", "lm_head", "Gather"))

ROTATIONS: dict[str, tuple[Pass, ...]] = {
    "plain": (),
    "stream": (Rotate(heads=False),),
    "stream, values": (Rotate(cache=True),),
    "stream, values, online": (Rotate(cache=True, online=True),),
}
FORMS: dict[str, tuple[Pass, ...]] = {
    "float": (),
    "8 bit, dynamic": (DynamicQuantize(where=_ADDED),),
    "4 bit rtn, 8 bit activations": (WeightOnly(method="rtn", where=_ADDED),),
    "4 bit rtn, float activations": (WeightOnly(method="rtn", accuracy_level=0, where=_ADDED),),
    "4 bit rtn, float tables, 8 bit activations": (WeightOnly(method="rtn", where=_LAYERS),),
}


def gaussian_clip(bits: int) -> float:
    """End of the symmetric uniform grid of 2^bits levels without zero that rounds N(0, 1) with the least squared error.

    The error's derivative by the step is zero; found by bisection, the integrals over the cells are closed forms.
    """
    levels = 2**bits

    def slope(step: float) -> float:
        centres = (np.arange(levels) - (levels - 1) / 2) * step
        edges = np.concatenate([[-np.inf], (centres[1:] + centres[:-1]) / 2, [np.inf]])
        mass = np.diff([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
        first = -np.diff(np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi))
        return float(np.sum((centres * mass - first) * centres))

    low, high = 1e-4, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low * (levels - 1) / 2


def quest_error(weight: np.ndarray, bits: int) -> float:
    """Relative squared error of (K, N) weights turned in blocks along K, on QuEST's grid with one scale a column."""
    block = min(len(weight) & -len(weight), _BLOCK)
    turned = rotate(weight, 0, rotation(block, 0), None, None).astype(np.float64)
    end = gaussian_clip(bits) * np.sqrt(np.mean(turned**2, axis=0))
    step = 2 * end / (2**bits - 1)
    rounded = (np.floor(np.clip(turned, -end, end * (1 - 1e-9)) / step) + 0.5) * step
    return float(np.sum((rounded - turned) ** 2) / np.sum(turned**2))


def search_error(weight: np.ndarray, bits: int) -> float:
    """Relative squared error of (K, N) weights on the symmetric grid that onnxcomp searches for each column."""
    return float(np.sum((weight_grid(weight, bits, 1, "mse").round_trip(weight) - weight) ** 2) / np.sum(weight**2))


def _matrices(model: ir.Model) -> Iterator[tuple[str, np.ndarray]]:
    for node in model.graph:
        tensor = node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if tensor is not None and not (node.name or "").endswith("_rotation"):
            yield (node.name or "").split(".")[-1], tensor.numpy()


def _print_weights(path: Path, bits: int = 4) -> None:
    turned = load(path)
    Pipeline(passes=ROTATIONS["stream, values"], capabilities=OrtCpu().capabilities()).run(turned)
    errors: dict[str, list[tuple[float, ...]]] = {}
    for (kind, before), (_, after) in zip(_matrices(load(path)), _matrices(turned), strict=True):
        row = (search_error(before, bits), search_error(after, bits), quest_error(before, bits))
        errors.setdefault(kind, []).append(row)
    for kind, rows in errors.items():
        plain, rotated, quest = np.mean(rows, axis=0)
        print(f"{kind:8} plain {plain:.4f}, rotated {rotated:.4f}, blocks on QuEST's grid {quest:.4f}")


def main() -> None:
    """Prints a line for each form and rotation."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.rotated", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--text", type=Path, default=wikitext())
    options = parser.parse_args()
    if options.weights:
        _print_weights(options.model)
        return
    tokens = Tokenizer(GgufFile(smollm2_weights())).encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    with tempfile.TemporaryDirectory() as folder:
        for form, quantized in FORMS.items():
            for label, rotations in ROTATIONS.items():
                model = load(options.model)
                Pipeline(passes=(*rotations, *quantized), capabilities=OrtCpu().capabilities()).run(model)
                path = Path(folder) / "model.onnx"
                save(model, path)
                found = perplexity(Decoder(path, threads=options.threads), tokens)
                print(f"{form:44} {label:24} perplexity {found:.3f} over {len(tokens) - 1} tokens", flush=True)


if __name__ == "__main__":
    main()
