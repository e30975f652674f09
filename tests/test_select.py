"""Which nodes a selector takes. What the exporter really records is tested with the export."""

import onnx_ir as ir
import pytest

from onnxcomp.errors import RecipeError
from onnxcomp.select import Select, module_paths

SCOPES = "pkg.torch.onnx.name_scopes"


def node(op="MatMul", name="/blocks/0/fc2/MatMul", modules=("", "blocks.0", "blocks.0.mlp", "blocks.0.mlp.fc2", "mm")):
    made = ir.Node("", op, [], name=name)
    if modules is not None:
        made.metadata_props[SCOPES] = repr(list(modules))
    return made


@pytest.mark.parametrize(
    ("selector", "taken"),
    [
        (Select(), True),
        (Select(op=("MatMul",)), True),
        (Select(op=("Gemm", "Mat*")), True),
        (Select(op=("Mat",)), False),
        (Select(op=("matmul",)), False),
        (Select(name=("/blocks/*/fc2/*",)), True),
        (Select(name=("/blocks/[1-9]/*",)), False),
        (Select(name=("re:/blocks/\\d+/.*",)), True),
        (Select(name=("re:/blocks/\\d+",)), False),
        (Select(module=("blocks.0.mlp.fc2",)), True),
        (Select(module=("blocks.0.mlp",)), True),
        (Select(module=("blocks.*.mlp.*",)), True),
        (Select(module=("blocks.1.mlp.fc2",)), False),
        (Select(module=("mm",)), False),
        (Select(module=("fc2",)), False),
        (Select(module=("re:blocks\\.[0-3]\\..*",)), True),
        (Select(op=("MatMul",), module=("blocks.1",)), False),
        (Select(op=("MatMul",), name=("/blocks/0/*",), module=("blocks.0",)), True),
        (Select(skip=("MatMul",)), False),
        (Select(skip=("/blocks/0/*",)), False),
        (Select(skip=("blocks.0.mlp",)), False),
        (Select(skip=("blocks.1*",)), True),
        (Select(op=("MatMul",), skip=("re:.*fc2.*",)), False),
    ],
)
def test_selector(selector, taken):
    assert selector(node()) is taken


def test_node_without_a_name_or_modules():
    bare = ir.Node("", "Relu", [])
    assert Select(op=("Relu",))(bare)
    assert not Select(module=("*",))(bare)
    assert not Select(name=("?*",))(bare)


@pytest.mark.parametrize("text", ["", "[", "{'a': 1}", "1", "__import__('os')", "[" * 1000, "[1, 2]"])
def test_scopes_that_are_not_a_list_of_texts(text):
    odd = node(modules=None)
    odd.metadata_props[SCOPES] = text
    assert module_paths(odd) == ()


@pytest.mark.parametrize("where", ["op", "name", "module", "skip"])
def test_invalid_regular_expression(where):
    with pytest.raises(RecipeError, match=r"'re:\(' is not a regular expression"):
        Select(**{where: ("re:(",)})
