"""A model that is larger than the memory it may take: read, looked at, cleaned up and written tensor by tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.model import load
from tests.corpus.large_decoder import measure, write_decoder

SIDE, LAYERS = 2048, 40  # 16 MB a matrix
LIMIT = 400 << 20
"""Peak resident bytes allowed; the model has 640 MB of weights, and Python with its libraries takes 120 MB."""

RUN = """
import resource, sys
from onnxcomp.api import inspect, rewrite
inspect(sys.argv[1])
rewrite(sys.argv[1], sys.argv[2], recipe="cleanup")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_model(path: Path) -> None:
    """A chain of matrix products whose weights lie on disk; every second one is transposed before it is used."""
    nodes, weights, value = [], [], "x"
    block = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32) / SIDE
    with path.with_name("weights.bin").open("wb") as file:
        for i in range(LAYERS):
            tensor = TensorProto(
                name=f"w{i}", data_type=TensorProto.FLOAT, dims=block.shape, data_location=TensorProto.EXTERNAL
            )
            entries = {"location": "weights.bin", "offset": str(file.tell()), "length": str(block.nbytes)}
            for key, text in entries.items():
                tensor.external_data.add(key=key, value=text)
            file.write((block * np.float32(1 + i / 64)).tobytes())
            weights.append(tensor)
            operand = f"w{i}"
            if i % 2:
                operand = f"t{i}"
                nodes.append(helper.make_node("Transpose", [f"w{i}"], [operand], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [value, operand], [f"v{i}"]))
            value = f"v{i}"
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", SIDE]) for n in ("x", value))
    graph = helper.make_graph(nodes, "large", [x], [y], weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    source, result = tmp_path / "large.onnx", tmp_path / "result.onnx"
    write_model(source)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, source, result], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < LIMIT
    assert not {n.op_type for n in onnx.load(result, load_external_data=False).graph.node} - {"MatMul"}
    old, new = (load(p).graph.initializers for p in (source, result))
    for i in (0, 1, LAYERS - 1):
        before, after = old[f"w{i}"].const_value, new[f"t{i}" if i % 2 else f"w{i}"].const_value
        assert before is not None
        assert after is not None
        np.testing.assert_array_equal(after.numpy(), before.numpy().T if i % 2 else before.numpy())


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "limit"), [("weight_only8", 400), ("weight_only4", 600)])
def test_a_decoder_is_quantized_in_bounded_memory(recipe, limit, tmp_path):
    """Limits in MB hold for mapped pages, too; `python -m tests.corpus.large_decoder` takes a larger model."""
    source, result = tmp_path / "decoder.onnx", tmp_path / "result.onnx"
    size = write_decoder(source, 2.2)
    assert measure(source, result, recipe)["VmHWM"] < limit
    ops = {n.op_type for n in onnx.load(result, load_external_data=False).graph.node}
    assert "MatMulNBits" in ops
    assert sum(f.stat().st_size for f in tmp_path.glob("result.onnx*")) < size / 2
