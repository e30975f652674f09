import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.errors import GraphError
from onnxcomp.export import export_module
from onnxcomp.model import load
from onnxcomp.select import Select, module_paths
from onnxcomp.targets.ort import reference_runner

torch = pytest.importorskip("torch", reason="needs PyTorch")

pytestmark = pytest.mark.torch


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(8, 16)
        self.act = torch.nn.GELU()
        self.fc2 = torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.mlp = Mlp()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


class ConvNet(torch.nn.Module):
    """With a normalisation that the exporter folds into the convolution."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.conv = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.stem(x))


class Two(torch.nn.Module):
    """With integers, two outputs, and one of them in a dict."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)

    def forward(self, ids, scale):
        x = self.embed(ids) * scale
        return x, {"sum": x.sum(dim=-1)}


class Branch(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class OneBatch(torch.nn.Module):
    def forward(self, x):
        return x.reshape(2, -1) + torch.ones(2, 8)


EXAMPLE = (torch.zeros(1, 3, 8),)


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def taken(path, **select):
    return [n.op_type for n in load(path).graph if Select(**{k: (v,) for k, v in select.items()})(n)]


def run(path, *arrays):
    model = load(path)
    feed = dict(zip([v.name for v in model.graph.inputs], arrays, strict=True))
    return list(reference_runner(model, [v.name for v in model.graph.outputs])(feed).values())


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    module = seeded(Net)
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    result = export_module(module, path, example_inputs=EXAMPLE, input_names=["tokens"], runner=reference_runner)
    return module, result


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """Writes a module of factories, imported from the current folder."""
    name = f"factories_{tmp_path.name}"

    def write(text):
        (tmp_path / f"{name}.py").write_text(f"import torch\n\n\n{text}\n")
        return f"{name}:make"

    monkeypatch.chdir(tmp_path)
    yield write
    sys.modules.pop(name, None)


def test_result(net):
    module, result = net
    model = load(result.path)
    assert result.path.is_file()
    assert result.nodes == sum(1 for _ in model.graph.all_nodes())
    assert model.opset_imports[""] == result.opset == 20
    assert 0 <= result.max_error < 1e-5
    assert [v.name for v in model.graph.inputs] == ["tokens"]
    assert not module.eval().training


def test_the_file_computes_what_the_module_computes(net):
    module, result = net
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = module.eval()(x)
    np.testing.assert_allclose(run(result.path, x.numpy())[0], expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "ops"),
    [
        ("blocks.0.mlp.fc2", ["MatMul", "Add"]),
        ("blocks.*.mlp.*", ["MatMul", "Add", "Gelu", "MatMul", "Add"] * 2),
        ("blocks.1.mlp", ["MatMul", "Add", "Gelu", "MatMul", "Add"]),
        (r"re:blocks\.\d\.norm", ["LayerNormalization"] * 2),
        ("blocks.2", []),
        ("mlp", []),
    ],
)
def test_select_by_module_path(net, pattern, ops):
    assert taken(net[1].path, module=pattern) == ops


def test_module_paths_run_from_outside_in(net):
    gelu = next(n for n in load(net[1].path).graph if n.op_type == "Gelu")
    assert module_paths(gelu) == ("blocks.0", "blocks.0.mlp", "blocks.0.mlp.act")


def test_a_folded_convolution_belongs_to_both_modules(tmp_path):
    module = seeded(ConvNet)
    result = export_module(module, tmp_path / "m.onnx", example_inputs=(torch.zeros(1, 3, 8, 8),), check=False)
    assert taken(result.path, op="BatchNormalization") == []
    assert taken(result.path, module="stem.0") == taken(result.path, module="stem.1") == ["Conv"]
    assert taken(result.path, module="stem.*") == ["Conv", "Relu"]
    assert taken(result.path, module="conv") == ["Conv"]


def test_the_file_holds_no_path_of_this_machine(net):
    content = net[1].path.read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opset(tmp_path, opset):
    result = export_module(
        seeded(Net), tmp_path / "m.onnx", example_inputs=EXAMPLE, opset=opset, runner=reference_runner
    )
    assert load(result.path).opset_imports[""] == result.opset == opset


@pytest.mark.parametrize("opset", [9, 99])
def test_opset_that_cannot_be(tmp_path, opset):
    with pytest.raises(GraphError, match=f"opset {opset}"):
        export_module(Net(), tmp_path / "m.onnx", example_inputs=EXAMPLE, opset=opset, check=False)
    assert not (tmp_path / "m.onnx").exists()


def test_dynamic_batch(tmp_path):
    module = seeded(Net)
    result = export_module(
        module, tmp_path / "m.onnx", example_inputs=EXAMPLE, dynamic_batch=True, runner=reference_runner
    )
    graph = load(result.path).graph
    assert not isinstance(graph.inputs[0].shape[0], int)
    assert list(graph.inputs[0].shape)[1:] == [3, 8]
    for batch in (1, 2, 5):
        assert run(result.path, np.zeros((batch, 3, 8), np.float32))[0].shape == (batch, 3, 4)


def test_a_module_for_one_batch_size_is_not_dynamic(tmp_path):
    with pytest.raises(GraphError, match="batch"):
        export_module(
            OneBatch(),
            tmp_path / "m.onnx",
            example_inputs=(torch.zeros(2, 8),),
            dynamic_batch=True,
            runner=reference_runner,
        )
    assert not (tmp_path / "m.onnx").exists()


def test_scalar_has_no_batch(tmp_path):
    with pytest.raises(GraphError, match="scalar"):
        export_module(Net(), tmp_path / "m.onnx", example_inputs=(torch.tensor(1.0),), dynamic_batch=True, check=False)


def test_several_inputs_and_outputs(tmp_path):
    result = export_module(
        seeded(Two),
        tmp_path / "m.onnx",
        example_inputs=(torch.tensor([[1, 9]]), torch.ones(1)),
        input_names=["ids", "scale"],
        output_names=["x", "sum"],
        runner=reference_runner,
    )
    graph = load(result.path).graph
    assert [v.name for v in graph.inputs] == ["ids", "scale"]
    assert [v.name for v in graph.outputs] == ["x", "sum"]
    assert result.max_error < 1e-6


@pytest.mark.parametrize("names", [{"input_names": ["a", "b"]}, {"output_names": ["a", "b"]}])
def test_wrong_number_of_names(tmp_path, names):
    with pytest.raises(GraphError, match=r"2 names were given for 1 (in|out)puts"):
        export_module(Net(), tmp_path / "m.onnx", example_inputs=EXAMPLE, check=False, **names)


def test_exported_for_inference_and_mode_restored(tmp_path):
    module = seeded(Net)
    module.blocks[0].eval()
    modes = [m.training for m in module.modules()]
    export_module(module, tmp_path / "m.onnx", example_inputs=EXAMPLE, runner=reference_runner)
    assert [m.training for m in module.modules()] == modes
    assert taken(tmp_path / "m.onnx", op="Dropout") == []


def test_factory(tmp_path, factories):
    factory = factories("def make():\n    return torch.nn.Linear(4, 2), (torch.zeros(3, 4),)")
    result = export_module(factory, tmp_path / "m.onnx", runner=reference_runner)
    assert run(result.path, np.zeros((3, 4), np.float32))[0].shape == (3, 2)


def test_given_inputs_go_before_those_of_the_factory(tmp_path, factories):
    factory = factories("def make():\n    return torch.nn.Linear(4, 2), (torch.zeros(3, 4),)")
    result = export_module(factory, tmp_path / "m.onnx", example_inputs=(torch.zeros(5, 4),), runner=reference_runner)
    assert list(load(result.path).graph.inputs[0].shape) == [5, 4]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return torch.nn.Linear(4, 2)", "has to return a module and a tuple of example inputs, not Linear"),
        ("return 1, (torch.zeros(1),)", r"has to give a torch\.nn\.Module, not int"),
        ("return torch.nn.Linear(4, 2), 3", "have to be a tuple of tensors, not int"),
        ("return torch.nn.Linear(4, 2), ()", "have to be a tuple of tensors"),
        ("return torch.nn.Linear(4, 2), (1,)", "example input 0 is a int, not a tensor"),
        ("raise ValueError('no weights')", "failed: ValueError: no weights"),
        ("return torch.nn.Linear(4, 2), (torch.zeros(1, 5),)", "cannot export Linear"),
    ],
)
def test_bad_factory(tmp_path, factories, body, message):
    with pytest.raises(GraphError, match=message):
        export_module(factories(f"def make():\n    {body}"), tmp_path / "m.onnx", runner=reference_runner)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("factory", ["nowhere_to_be_found:make", "math:nothing", "no colon", ":", "a:"])
def test_factory_that_is_not_there(tmp_path, factory):
    with pytest.raises(GraphError, match="the factory is not to be had"):
        export_module(factory, tmp_path / "m.onnx", runner=reference_runner)


def test_module_needs_example_inputs(tmp_path):
    with pytest.raises(GraphError, match="needs example inputs"):
        export_module(Net(), tmp_path / "m.onnx", runner=reference_runner)


def test_check_needs_a_runner(tmp_path):
    with pytest.raises(GraphError, match="needs a runner"):
        export_module(Net(), tmp_path / "m.onnx", example_inputs=EXAMPLE)


def test_branch_on_data(tmp_path):
    with pytest.raises(GraphError, match="cannot export Branch"):
        export_module(Branch(), tmp_path / "m.onnx", example_inputs=EXAMPLE, check=False)


def off_by(change):
    def runner(model, outputs):
        inner = reference_runner(model, outputs)
        return lambda feed: {k: change(v) for k, v in inner(feed).items()}

    return runner


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v + 0.01, r"off by 0\.01"),
        (lambda v: v * np.nan, "off by nan"),
        (lambda v: v[:, :2], r"is \(1, 2, 4\) in the exported model, \(1, 3, 4\) in the module"),
    ],
)
def test_wrong_output(tmp_path, change, message):
    module = seeded(Net)
    with pytest.raises(GraphError, match=message):
        export_module(module, tmp_path / "m.onnx", example_inputs=EXAMPLE, runner=off_by(change))
    assert list(tmp_path.iterdir()) == []
    assert all(m.training for m in module.modules())


def test_wrong_only_where_the_example_is_not(tmp_path):
    """Zeros times anything are zeros: noise has to show it."""
    module = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(GraphError, match="off by"):
        export_module(
            module, tmp_path / "m.onnx", example_inputs=(torch.zeros(1, 4),), runner=off_by(lambda v: v * 1.01)
        )


def test_tolerance(tmp_path):
    result = export_module(
        seeded(Net), tmp_path / "m.onnx", example_inputs=EXAMPLE, runner=off_by(lambda v: v + 0.01), atol=0.02
    )
    assert result.max_error == pytest.approx(0.01, abs=1e-4)


def test_unchecked(tmp_path):
    assert export_module(Net(), tmp_path / "m.onnx", example_inputs=EXAMPLE, check=False).max_error is None


@pytest.mark.parametrize("package", ["torch", "onnxscript"])
def test_missing_package(tmp_path, monkeypatch, package):
    module = Net()
    if package == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GraphError, match="pip install"):
        export_module(module, tmp_path / "m.onnx", example_inputs=EXAMPLE, check=False)
