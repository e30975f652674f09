"""Targets for a GPU, on a machine that has none: what the artifact holds, and what is said where it cannot run."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import TensorProto

from onnxcomp import api
from onnxcomp.errors import DeviceError, TargetError
from onnxcomp.ops import NM_OPS, OPS
from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.rewrite import Context
from onnxcomp.targets.ort import OrtCpu, reference_runner, runtime
from onnxcomp.targets.ort.capabilities import capabilities
from onnxcomp.targets.ort.gpu import OrtCuda, OrtTensorrt
from onnxcomp.targets.ort.plain_nm import PlainNm
from onnxcomp.targets.ort.runtime import make_session, onnxruntime, session_options
from onnxcomp.targets.ort.sparse_weights import has_sparse_weight

K, N = 64, 32
X = {"x": np.random.default_rng(1).normal(size=(3, K)).astype(np.float32)}
GPU = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
NO_CUDA = "this onnxruntime has no CUDAExecutionProvider"


def zeros(shape: tuple[int, ...], kept: int, group: int, axis: int = 0) -> np.ndarray:
    """A weight of which `kept` of `group` along an axis are not zero; dense if there is no group."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    return weight if not group else np.where(np.indices(shape)[axis] % group < kept, weight, 0).astype(np.float32)


def gemm(kept: int = 2, group: int = 4) -> ir.Model:
    b = Builder()
    weight = b.const(zeros((N, K), kept, group, axis=1), "w")
    y = b.op("Gemm", b.input("x", ["rows", K]), weight, b.floats(N), name="gemm", transB=1)
    return b.output(y).model(20)


def packed(kept: int = 2, group: int = 4, values: str = "keep") -> ir.Model:
    model = gemm(kept, group)
    edits = NmPack(values=values).apply(model, Context(capabilities=capabilities("ort-cpu")))
    assert [e.action for e in edits] == ["applied"]
    return model


def portable(model: ir.Model) -> np.ndarray:
    name = model.graph.outputs[0].name
    return reference_runner(model, [name])(X)[name]


def options(artifact) -> dict[str, str]:
    return artifact.manifest["providers"][0]["options"]


def on_cpu(artifact) -> np.ndarray:
    """What the artifact computes; optimised for the CPU, integer weights would make it round inputs to 8 bits."""
    return make_session(artifact.path / "model.onnx", session_options(threads=1, optimize=False)).run(None, X)[0]


@pytest.fixture
def have_gpu(monkeypatch):
    """Makes onnxruntime seem to have the GPU's providers, whose work the CPU does; returns what sessions get."""
    real = onnxruntime()
    made: list[tuple[list[str], list[dict[str, str]]]] = []

    class Session:
        loaded = True

        def __init__(self, source, settings, providers, provider_options, enable_fallback):
            made.append((providers, provider_options))
            assert enable_fallback == 0
            self._inner = real.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
            self._names = providers if Session.loaded else ["CPUExecutionProvider"]

        def get_providers(self):
            return self._names

        def __getattr__(self, name):
            return getattr(self._inner, name)

    class Module:
        InferenceSession = Session

        def get_available_providers(self):
            return [*GPU, "CPUExecutionProvider"]

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(runtime, "onnxruntime", Module)
    return made, Session


# --- what the artifact holds


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (2, 8)])
@pytest.mark.parametrize("target", ["ort-cuda", "ort-tensorrt"])
def test_packed_weights_become_plain_ones(tmp_path, target, kept, group):
    model = packed(kept, group)
    artifact = api.compile(model, tmp_path / "artifact", target=target)
    stored = ir.load(artifact.path / "model.onnx")
    assert [n.op_type for n in stored.graph] == ["MatMul", "Add"]
    assert not stored.functions
    (weight,) = (v.const_value.numpy() for v in stored.graph.initializers.values() if len(v.shape) == 2)
    np.testing.assert_array_equal(weight, zeros((N, K), kept, group, axis=1).T)
    np.testing.assert_allclose(on_cpu(artifact), portable(model), rtol=1e-6, atol=1e-6)
    assert [n.op_type for n in model.graph] == ["NMMatMul", "Add"], "the model stays as it is"


def test_integers_stay_integers(tmp_path):
    model = packed(values="int8")
    artifact = api.compile(model, tmp_path / "artifact", target="ort-tensorrt")
    stored = ir.load(artifact.path / "model.onnx")
    assert [n.op_type for n in stored.graph] == ["DequantizeLinear", "MatMul", "Add"]
    dequantize = stored.graph[0]
    assert dequantize.attributes.get_int("axis") == 1
    integers = dequantize.inputs[0].const_value.numpy()
    assert integers.dtype == np.int8
    assert not integers[zeros((N, K), 2, 4, axis=1).T == 0].any()
    assert np.count_nonzero(integers) > 0.45 * integers.size  # a few small weights are rounded to 0
    np.testing.assert_allclose(on_cpu(artifact), portable(model), rtol=1e-6, atol=1e-6)
    assert options(artifact) == {
        "trt_sparsity_enable": "True", "trt_fp16_enable": "False", "trt_int8_enable": "True"
    }  # fmt: skip


def calls(dtype: ir.DataType | None, op: str = "NMMatMul", *, again: bool = False) -> ir.Model:
    """One or two calls whose input is of a type, or of one that is not noted."""
    model = packed(values="int8" if op.endswith("Int8") else "keep")
    node = model.graph[0]
    x = node.inputs[0]
    if dtype is not None:
        x.dtype = dtype
    else:
        relu = ir.node("Relu", [x], name="relu")
        model.graph.insert_before(node, relu)
        node.replace_input_with(0, relu.outputs[0])
    if again:
        other = ir.node(op, list(node.inputs), node.attributes, domain=node.domain, name="other")
        model.graph.insert_before(node, other)
        model.graph.outputs.append(other.outputs[0])
        other.outputs[0].name, other.outputs[0].dtype = "other", x.dtype
    return model


@pytest.mark.parametrize("op", ["NMMatMul", "NMMatMulInt8"])
def test_half_precision_inputs_get_half_precision_weights(op):
    model = calls(ir.DataType.FLOAT16, op)
    x = X["x"].astype(np.float16)
    arrays = [v.const_value.numpy() for v in model.graph[0].inputs[1:]]
    expected = NM_OPS[op].reference(x, *arrays, m=4, k=K)
    del model.graph.outputs[:]
    model.graph.remove(model.graph[-1], safe=True)
    model.graph.outputs.append(model.graph[0].outputs[0])
    model.graph.outputs[0].dtype = ir.DataType.FLOAT16
    PlainNm().apply(model, Context(capabilities=OrtCuda().capabilities()))
    assert [n.op_type for n in model.graph][-1] == "MatMul"
    found = make_session(ir.to_proto(model).SerializeToString(), session_options(threads=1)).run(None, {"x": x})[0]
    assert found.dtype == np.float16
    # Sums of 32 products of about 1, in float32 or rounded along the way.
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=5e-3, atol=2e-2)


def test_calls_that_share_a_weight_go_on_sharing_it():
    model = calls(ir.DataType.FLOAT, "NMMatMulInt8", again=True)
    edits = PlainNm().apply(model, Context(capabilities=OrtCuda().capabilities()))
    assert [e.detail for e in edits] == ["multiplies by the plain weight, whose 2:4 zeros are stored"] * 2
    assert [n.op_type for n in model.graph].count("DequantizeLinear") == 1
    assert not PlainNm().apply(model, Context(capabilities=OrtCuda().capabilities()))


def test_exact_calls_multiply_floats():
    model = calls(ir.DataType.FLOAT, "NMMatMulInt8", again=True)
    expected = portable(model)
    model.graph[0].attributes["exact"] = ir.AttrInt64("exact", 1)
    PlainNm().apply(model, Context(capabilities=OrtCuda().capabilities()))
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "MatMul", "MatMul", "Add"]
    exact = model.graph[1].inputs[1].const_value
    assert exact.dtype == ir.DataType.FLOAT
    assert has_sparse_weight(model)
    found = reference_runner(model, ["other"])(X)["other"] + model.graph[-1].inputs[1].const_value.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_types_that_are_not_noted_are_inferred():
    model = calls(None)
    assert [e.action for e in PlainNm().apply(model, Context(capabilities=OrtCuda().capabilities()))] == ["applied"]


def test_a_weight_that_is_computed_keeps_its_function():
    model = packed()
    node = model.graph[0]
    values = node.inputs[1]
    relu = ir.node("Relu", [values], name="relu")
    model.graph.insert_before(node, relu)
    node.replace_input_with(1, relu.outputs[0])
    (edit,) = PlainNm().apply(model, Context(capabilities=OrtCuda().capabilities()))
    assert (edit.action, edit.detail) == ("refused", "its weight is not a constant; it runs by its function body")
    assert model.functions


def test_other_portable_ops_are_written_out(tmp_path):
    b = Builder()
    threshold = b.const(np.float32(0.5))
    y = b.op("ThresholdMatMul", b.input("x", ["rows", K]), b.floats(K, N), threshold, name="t", domain="onnxcomp")
    model = b.output(y).model(20)
    OPS["ThresholdMatMul"].install(model)
    artifact = api.compile(model, tmp_path / "artifact", target="ort-cuda")
    stored = ir.load(artifact.path / "model.onnx")
    assert {n.domain for n in stored.graph} == {""}
    np.testing.assert_allclose(on_cpu(artifact), portable(model), rtol=1e-5, atol=1e-5)


# --- the sparsity option


@pytest.mark.parametrize(
    ("kept", "group", "expected"), [(2, 4, "True"), (1, 4, "True"), (1, 2, "True"), (0, 0, "False"), (4, 8, "False")]
)
def test_sparsity_is_asked_for_where_a_weight_has_it(tmp_path, kept, group, expected):
    artifact = api.compile(gemm(kept, group), tmp_path / "artifact", target="ort-tensorrt")
    assert options(artifact)["trt_sparsity_enable"] == expected
    assert [p["name"] for p in artifact.manifest["providers"]] == [*GPU, "CPUExecutionProvider"]
    assert artifact.manifest["manifest_version"] == 1


def linear(op: str, weight: np.ndarray, **attributes) -> ir.Model:
    b = Builder()
    x = b.input("x", [1, weight.shape[1], 8, 8] if op == "Conv" else ["rows", K])
    return b.output(b.op(op, x, b.const(weight), **attributes)).model()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (linear("MatMul", zeros((K, N), 2, 4)), True),
        (linear("MatMul", zeros((K, N), 2, 4, axis=1)), False),
        (linear("MatMul", np.zeros((2, N), np.float32)), False),
        (linear("MatMul", zeros((2, K, N), 2, 4, axis=1)), False),
        (linear("Conv", zeros((8, 16, 3, 3), 2, 4, axis=1)), True),
        (linear("Conv", zeros((8, 16, 3, 3), 2, 4)), False),
        (linear("Conv", zeros((8, 1, 3, 3), 0, 1, axis=1), group=8), False),
        (linear("Add", zeros((K, N), 2, 4)), False),
    ],
)
def test_zeros_count_along_the_axis_that_is_summed_over(model, expected):
    assert has_sparse_weight(model) is expected


@pytest.mark.parametrize(("zero", "expected"), [(None, True), (0, True), (3, False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_zeros_of_integers_are_those_of_zero_point_0(zero, expected, transposed):
    b = Builder()
    pattern = zeros((K, N), 2, 4) if not transposed else zeros((N, K), 2, 4, axis=1)
    integers = np.where(pattern != 0, 7, zero or 0).astype(np.int8)
    parameters = [b.const(np.float32(0.1))] + ([] if zero is None else [b.const(np.int8(zero))])
    weight = b.op("DequantizeLinear", b.const(integers), *parameters)
    weight = b.op("Transpose", weight, perm=[1, 0]) if transposed else weight
    model = b.output(b.op("MatMul", b.input("x", ["rows", K]), weight)).model()
    assert has_sparse_weight(model) is expected


def test_external_weights_are_read(tmp_path):
    ir.save(gemm(), tmp_path / "m.onnx", external_data="w.bin", size_threshold_bytes=0)
    assert has_sparse_weight(ir.load(tmp_path / "m.onnx"))


def test_half_precision_is_allowed_where_the_model_has_it(tmp_path):
    b = Builder()
    half = b.const(np.zeros((K, N), np.float16))
    y = b.op("MatMul", b.input("x", ["rows", K], TensorProto.FLOAT16), half)
    artifact = api.compile(b.output(y, TensorProto.FLOAT16).model(), tmp_path / "artifact", target="ort-tensorrt")
    assert (options(artifact)["trt_fp16_enable"], options(artifact)["trt_int8_enable"]) == ("True", "False")


# --- where the device is missing


def test_nothing_is_said_about_what_runs(tmp_path, cli):
    artifact = api.compile(packed(), tmp_path / "artifact", target="ort-cuda")
    assert artifact.manifest["unaudited"] == artifact.audit.note == "not audited: " + NO_CUDA
    assert not artifact.audit.rows
    assert OrtCuda().open(artifact.path) == artifact
    ir.save(gemm(), tmp_path / "m.onnx")
    code, out, err = cli("compile", tmp_path / "m.onnx", "-o", tmp_path / "other", "-t", "ort-tensorrt")
    assert (code, err) == (0, "")
    assert out.startswith("not audited: this onnxruntime has no TensorrtExecutionProvider; artifact in ")


@pytest.mark.parametrize(("target", "what"), [("ort-cuda", "CUDA"), ("ort-tensorrt", "Tensorrt")])
def test_what_cannot_run_says_what_to_install(tmp_path, cli, target, what):
    ir.save(gemm(), tmp_path / "m.onnx")
    artifact = api.compile(gemm(), tmp_path / "artifact", target=target).path
    for arguments in (
        ("profile", artifact),
        ("profile", tmp_path / "m.onnx"),
        ("compare", tmp_path / "m.onnx", tmp_path / "m.onnx", "--data", "random"),
        ("compress", tmp_path / "m.onnx", "-o", tmp_path / "out", "--recipe", "cleanup"),
        ("legalize", tmp_path / "m.onnx", "-o", tmp_path / "legal.onnx"),
    ):
        code, out, err = cli(*arguments, "-t", target)
        assert (code, out) == (2, ""), (arguments, err)
        assert f"this onnxruntime has no {what}ExecutionProvider; install the GPU build" in err
        assert "onnxruntime-gpu" in err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_rewriting_needs_no_device(tmp_path, cli):
    ir.save(gemm(), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    code, _, err = cli("rewrite", tmp_path / "m.onnx", "-o", out, "--recipe", "cleanup", "-t", "ort-cuda")
    assert code == 0, err


def test_figures_need_the_device(tmp_path):
    target = OrtCuda()
    artifact = target.compile(gemm(), tmp_path / "artifact")
    for ask in (target.load, lambda a: target.node_times(a, X), lambda a: target.peak_memory(a, X)):
        with pytest.raises(DeviceError, match=NO_CUDA):
            ask(artifact)
    with pytest.raises(DeviceError, match=NO_CUDA):
        target.require_device()
    OrtCpu().require_device()


# --- where it is there


def test_a_session_gets_providers_and_options(tmp_path, have_gpu):
    made, _ = have_gpu
    target = OrtTensorrt()
    artifact = target.compile(gemm(), tmp_path / "artifact")
    assert artifact.audit.note.startswith("not audited: TensorRT makes engines")
    made.clear()
    found = target.load(artifact).run(X)
    np.testing.assert_allclose(next(iter(found.values())), portable(gemm()), rtol=1e-5, atol=1e-5)
    asked = {"trt_sparsity_enable": "True", "trt_fp16_enable": "False", "trt_int8_enable": "False"}
    assert made[0] == ([*GPU, "CPUExecutionProvider"], [asked, {}, {}])
    assert target.node_times(artifact, X) == ()


def test_a_cuda_artifact_is_audited(tmp_path, have_gpu):
    artifact = OrtCuda().compile(gemm(), tmp_path / "artifact")
    assert artifact.audit.note == ""
    assert [(r.node, r.quantized) for r in artifact.audit.rows] == [("gemm", False)]


def test_a_provider_that_is_left_out_is_an_error(tmp_path, have_gpu, monkeypatch):
    _, session = have_gpu
    target = OrtCuda()
    artifact = target.compile(gemm(), tmp_path / "artifact")
    monkeypatch.setattr(session, "loaded", False)
    with pytest.raises(DeviceError, match="could not load CUDAExecutionProvider and would run on CPUExecutionProvider"):
        target.load(artifact)
    again = target.compile(gemm(), tmp_path / "again")
    assert again.audit.note.startswith("not audited: onnxruntime could not load CUDAExecutionProvider")


def test_an_error_of_the_device_is_told_from_one_of_the_model(tmp_path, have_gpu, monkeypatch):
    _, session = have_gpu
    target = OrtCuda()
    artifact = target.compile(gemm(), tmp_path / "artifact")

    def fail(*_, **__):
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")

    monkeypatch.setattr(session, "__init__", fail)
    with pytest.raises(DeviceError, match="cannot use CUDAExecutionProvider: CUDA failure 100"):
        target.load(artifact)


def test_peak_memory_where_the_provider_is_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(OrtCuda, "chain", ("CPUExecutionProvider",))
    target = OrtCuda()
    artifact = target.compile(gemm(), tmp_path / "artifact")
    assert artifact.audit.rows
    assert target.peak_memory(artifact, X) > 1 << 20
    target.require_device()


# --- the manifest


def test_artifacts_without_providers_are_for_the_cpu(tmp_path):
    artifact = OrtCpu().compile(gemm(), tmp_path / "artifact")
    path = artifact.path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("providers") == [{"name": "CPUExecutionProvider", "options": {}}]
    assert manifest.pop("unaudited") == ""
    path.write_text(json.dumps(manifest))
    assert OrtCpu().open(artifact.path) == artifact


@pytest.mark.parametrize(
    "providers",
    [
        [],
        [{"name": "OtherExecutionProvider", "options": {}}],
        [{"name": "TensorrtExecutionProvider", "options": {"trt_engine_decryption_lib_path": "evil.so"}}],
        [{"name": "TensorrtExecutionProvider", "options": {"trt_sparsity_enable": "1"}}],
    ],
)
def test_other_providers_and_options_are_refused(tmp_path, providers):
    artifact = OrtTensorrt().compile(gemm(), tmp_path / "artifact")
    path = artifact.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "providers": providers}))
    with pytest.raises(TargetError, match="is not valid: providers"):
        OrtTensorrt().open(artifact.path)
