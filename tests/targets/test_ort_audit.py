"""The audit names what each node became, and for each known fallback the reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.audit import audit as read_audit
from onnxcomp.targets.ort.capabilities import PLACEMENTS


def audit(builder, tmp_path, opset=17):
    return OrtCpu().compile(builder.model(opset), tmp_path / "a").audit


def only_fallback(builder, tmp_path):
    (row,) = audit(builder, tmp_path).fallbacks
    return row


def test_quantized_network_is_integer(small_model, tmp_path):
    found = OrtCpu().compile(small_model, tmp_path / "a").audit
    assert {r.node: r.executed_as for r in found.rows} == {
        "conv1": "QLinearConv",
        "conv2": "QLinearConv",
        "classify": "QGemm",
    }
    assert found.integer_mac_share == 1.0
    assert not found.fallbacks
    assert found.rows[0].macs == 8 * 16 * 16 * 8 * 9
    assert found.executed_ops["QLinearGlobalAveragePool"] == 1


def test_float_network_is_mapped_through_layout_change(b, tmp_path):
    x = b.input("x", ["n", 16, 8, 8])
    y = b.op("Relu", b.op("Conv", x, b.floats(16, 16, 3, 3), name="plain", pads=[1, 1, 1, 1]))
    y = b.op("Conv", y, b.floats(16, 1, 3, 3), name="depthwise", group=16, pads=[1, 1, 1, 1])
    y = b.op("BatchNormalization", y, *(b.const(np.ones(16, np.float32)) for _ in range(4)))
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    y = b.op("Add", b.op("MatMul", y, b.floats(16, 4), name="dense"), b.floats(4))
    rows = audit(b.output(b.op("Softmax", y)), tmp_path).rows
    assert [(r.node, r.executed_as, r.quantized, r.integer) for r in rows] == [
        ("plain", "Conv", False, False),
        ("depthwise", "Conv", False, False),
        ("dense", "Gemm", False, False),
    ]
    assert rows[2].macs == 64  # unknown batch counts as 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [["n", 16], [2, 5, 16], ["n", 5, 16]])
@pytest.mark.parametrize("requantize", [False, True])
def test_int32_bias_is_integer_in_every_shape(b, tmp_path, shape, bits, requantize):
    y = b.matmul(b.qdq(b.input("x", shape), zero=8, bits=bits))
    y = b.op("Add", y, b.bias())
    found = audit(b.output(b.qdq(y) if requantize else b.op("Tanh", y)), tmp_path)
    assert [r.integer for r in found.rows] == [True]


def test_conv_without_quantize_behind(b, tmp_path):
    row = only_fallback(b.output(b.op("Tanh", b.op("Add", b.conv(b.image()), b.input("y", [1, 8, 16, 16])))), tmp_path)
    assert row.executed_as in {"Conv", "FusedConv"}
    assert "no QuantizeLinear follows" in row.reason


def test_relu_with_zero_point(b, tmp_path):
    row = only_fallback(b.output(b.qdq(b.op("Relu", b.conv(b.image()), name="act"), zero=3)), tmp_path)
    assert row.executed_as == "FusedConv"
    assert "'act'" in row.reason
    assert "zero point 3" in row.reason


def test_clip_tighter_than_quantizer(b, tmp_path):
    y = b.op("Clip", b.conv(b.image()), b.const(np.float32(0)), b.const(np.float32(6)))
    row = only_fallback(b.output(b.qdq(y, zero=0)), tmp_path)
    assert "lower the scale there to at most 0.0235294" in row.reason


def test_clip_as_wide_as_quantizer_is_integer(b, tmp_path):
    y = b.op("Clip", b.conv(b.image()), b.const(np.float32(0)), b.const(np.float32(6)))
    assert audit(b.output(b.qdq(y, scale=6 / 255, zero=0)), tmp_path).integer_mac_share == 1.0


def test_activation_before_quantize(b, tmp_path):
    row = only_fallback(b.output(b.qdq(b.op("Sigmoid", b.conv(b.image()), name="act"), zero=0)), tmp_path)
    assert "Sigmoid 'act' stands between" in row.reason


def test_batch_normalization_behind(b, tmp_path):
    ones = [b.const(np.ones(8, np.float32)) for _ in range(4)]
    row = only_fallback(b.output(b.qdq(b.op("BatchNormalization", b.conv(b.image()), *ones, name="bn"))), tmp_path)
    assert "BatchNormalization 'bn'" in row.reason


def test_two_readers(b, tmp_path):
    y = b.conv(b.image())
    row = only_fallback(b.output(b.op("Tanh", y, name="peek")).output(b.qdq(y)), tmp_path)
    assert "'peek'" in row.reason


def test_float_graph_output(b, tmp_path):
    y = b.matmul(b.qdq(b.input("x", ["n", 16])))
    row = only_fallback(b.output(b.qdq(y)).output(y), tmp_path)
    assert "'matmul_out' is a graph output" in row.reason


def test_float_bias_of_matmul(b, tmp_path):
    y = b.op("Add", b.matmul(b.qdq(b.input("x", ["n", 16]))), b.floats(32), name="add")
    row = only_fallback(b.output(b.op("Tanh", y)), tmp_path)
    assert row.executed_as in {"Gemm", "FusedGemm"}
    assert "Add 'add'" in row.reason
    assert "is float; store it as int32" in row.reason


def test_residual_taken_for_a_bias(b, tmp_path):
    y = b.op("Add", b.matmul(b.qdq(b.input("x", [4, 16]))), b.input("residual", [4, 32]))
    row = only_fallback(b.output(b.op("Tanh", y)), tmp_path)
    assert "is not constant" in row.reason


def test_bias_with_wrong_scale(b, tmp_path):
    y = b.op("Conv", b.image(), b.weight((8, 8, 3, 3), 0), b.bias(error=2.0), name="conv")
    row = only_fallback(b.output(b.qdq(y)), tmp_path)
    assert "another scale than s_x * s_w" in row.reason


def test_alpha(b, tmp_path):
    y = b.op("Gemm", b.qdq(b.input("x", ["n", 16])), b.weight((16, 32), 1), b.bias(), alpha=0.5)
    assert "alpha" in only_fallback(b.output(b.op("Tanh", y)), tmp_path).reason


def test_flatten_before_the_classifier(b, tmp_path):
    y = b.op("Flatten", b.qdq(b.op("GlobalAveragePool", b.image())), name="flat")
    y = b.op("Gemm", y, b.weight((4, 8), 0), b.bias(), transB=1)
    row = only_fallback(b.output(b.op("Tanh", y)), tmp_path)
    assert "Flatten 'flat' stands between" in row.reason


def test_transposed_convolution(b, tmp_path):
    y = b.op("ConvTranspose", b.image(), b.weight((8, 8, 2, 2), 1), strides=[2, 2])
    assert "no integer ConvTranspose" in only_fallback(b.output(b.qdq(y)), tmp_path).reason


def test_sixteen_bit_activation(b, tmp_path):
    y = b.op("Conv", b.qdq(b.input("x", [1, 8, 8, 8]), dtype=np.uint16), b.weight((8, 8, 3, 3), 0))
    row = only_fallback_at(b.output(b.qdq(y, dtype=np.uint16)), tmp_path, opset=21)
    assert "quantized to uint16" in row.reason


def only_fallback_at(builder, tmp_path, opset):
    (row,) = audit(builder, tmp_path, opset).fallbacks
    return row


def test_signed_activation_at_the_border(b, tmp_path):
    scale, zero = b.const(np.float32(0.05)), b.const(np.int8(0))
    x = b.op("DequantizeLinear", b.input("x", [1, 8, 16, 16], TensorProto.INT8), scale, zero)
    row = only_fallback(b.output(b.qdq(b.conv(x), zero=0, dtype=np.int8)), tmp_path)
    assert "use uint8" in row.reason


def test_weight_only_is_not_called_quantized(b, tmp_path):
    found = audit(b.output(b.op("Tanh", b.matmul(b.input("x", ["n", 16])))), tmp_path)
    assert [(r.quantized, r.executed_as) for r in found.rows] == [(False, "MatMulNBits")]


def test_recurrent_node_is_listed_in_float(b, tmp_path):
    y = b.op("LSTM", b.input("x", [5, 1, 4]), b.floats(1, 12, 4), b.floats(1, 12, 3), name="lstm", hidden_size=3)
    found = audit(b.output(y), tmp_path)
    assert [(r.node, r.executed_as, r.quantized, r.integer) for r in found.rows] == [("lstm", "LSTM", False, False)]


def test_nodes_in_functions_and_subgraphs(tmp_path):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "onnxcomp" : 1]>
        g (float[N,2] x, bool c) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}> {
            a = onnxcomp.Twice(x, w)
            b = onnxcomp.Twice(a, w)
            y = If (c) <then_branch = t () => (float[N,2] p) { p = MatMul(b, w) },
                        else_branch = e () => (float[N,2] q) { q = Relu(b) }>
        }
        <domain: "onnxcomp", opset_import: ["" : 17]> Twice (u, v) => (o) { k = Abs(u) o = MatMul(k, v) }""")
    found = OrtCpu().compile(model, tmp_path / "a").audit
    assert [r.executed_as for r in found.rows] == ["MatMul"] * 3
    assert len({r.node for r in found.rows}) == 3
    assert len(model.functions) == 1


def test_a_node_that_is_gone_is_not_claimed(small_model):
    (classify,) = [n for n in small_model.graph if n.name == "classify"]
    found = read_audit(small_model, onnx.ModelProto())
    assert {r.executed_as for r in found.rows} == {""}
    assert "not found" in found.rows[-1].reason
    assert found.rows[-1].node == classify.name


_ATTRIBUTES = {
    "AveragePool": {"kernel_shape": [2, 2]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Concat": {"axis": 1},
    "DepthToSpace": {"blocksize": 2},
    "Split": {"axis": 1},
}
_EXTRA = {
    "Expand": ([2, 8, 16, 16],),
    "Gather": ([1],),
    "GatherElements": (np.zeros((1, 8, 16, 16), np.int64),),
    "Reshape": ([1, -1],),
    "ReduceMax": (),
    "Slice": ([1], [3], [1]),
    "Squeeze": ([0],),
    "Tile": ([2, 1, 1, 1],),
    "Unsqueeze": ([0],),
}


@pytest.mark.parametrize("op_type", sorted(op for op, p in PLACEMENTS.items() if p.kind != "linear"))
def test_placement_is_true(b, tmp_path, op_type):
    """Every op that the capabilities name runs on integers between Q/DQ pairs."""
    inputs = [b.image()]
    if op_type in {"Add", "Mul", "Concat"}:
        inputs.append(b.qdq(b.input("y", [1, 8, 16, 16]), scale=0.06))
    inputs += [b.const(np.asarray(a, np.int64)) for a in _EXTRA.get(op_type, ())]
    y = b.op(op_type, *inputs, **_ATTRIBUTES.get(op_type, {}))
    scale = 0.05 if PLACEMENTS[op_type].kind == "passthrough" else 0.07
    found = audit(b.output(b.qdq(y, scale=scale)), tmp_path).executed_ops
    assert found["DequantizeLinear"] == 1  # only the last one
    assert f"QLinear{op_type}" in found or PLACEMENTS[op_type].kind == "passthrough"
