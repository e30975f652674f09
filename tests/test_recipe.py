"""Recipes: what they say, and what is said of those that are wrong."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir
import pytest
from annotated_types import Ge

from onnxcomp import registry
from onnxcomp.errors import RecipeError
from onnxcomp.recipe import builtin_recipes, load_recipe, parse_recipe
from onnxcomp.rewrite import Context, Edit, Pass
from onnxcomp.select import Select


@dataclass(frozen=True, kw_only=True)
class Fake(Pass):
    name: ClassVar[str] = "fake"
    summary: ClassVar[str] = "Does nothing."

    bits: Annotated[int, Ge(2)] = 8
    mode: Literal["fast", "slow"] = "fast"
    share: float = 0.5
    on: bool = True

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        return []


class Duck:
    name = "duck"


@pytest.fixture
def fake(monkeypatch):
    """Registers more passes beside the real ones; gives the function that registers."""
    real = registry.entry_points
    added = []

    def entry_points(group):
        return [*real(group=group), *(e for e in added if e.group == group)]

    def add(name, value="Fake", group=registry.PASSES):
        monkeypatch.setitem(sys.modules, "fake_passes", FakeModule)
        added.append(EntryPoint(name, f"fake_passes:{value}" if ":" not in value else value, group))

    monkeypatch.setattr(registry, "entry_points", entry_points)
    add("fake")
    return add


class FakeModule:
    Fake = Fake
    Duck = Duck


def recipe(text):
    return parse_recipe("version = 1\n" + text)


def test_builtin_recipes_are_valid():
    assert "int8" in builtin_recipes()
    for name in builtin_recipes():
        found = load_recipe(name)
        assert found.name == name
        assert found.summary
        assert found.passes
        assert found.source.startswith("version = 1")


def test_a_pass_of_a_third_party(fake):
    found = recipe("""
        target = "ort-cpu"
        summary = "mine"
        [[passes]]
        pass = "fake"
        bits = 4
        mode = "slow"
        share = 1
        [passes.where]
        op = "MatMul"
        skip = ["head", "re:.*norm.*"]
    """)
    expected = Fake(bits=4, mode="slow", share=1.0, where=Select(op=("MatMul",), skip=("head", "re:.*norm.*")))
    assert found.passes == (expected,)
    assert (found.target, found.summary) == ("ort-cpu", "mine")


def test_defaults(fake):
    assert recipe('[[passes]]\npass = "fake"').passes == (Fake(),)


def test_file(tmp_path, fake):
    path = tmp_path / "mine.toml"
    path.write_text('version = 1\n[[passes]]\npass = "fake"\n', encoding="utf-8")
    assert load_recipe(str(path)).name == "mine"


STEP = '[[passes]]\npass = "fake"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"recipe: unknown key 'x'; a recipe has \['version', 'summary', 'target', 'passes'\]"),
        ("", r"it needs a list of tables \[\[passes\]\]"),
        ("passes = 3", r"it needs a list of tables \[\[passes\]\]"),
        ("passes = ['cleanup']", r"it needs a list of tables \[\[passes\]\]"),
        ("target = 3\npasses = []", "target has to be a string"),
        ("[[passes]]\nbits = 3", r"passes\[0\]: it needs a key 'pass'"),
        ("[[passes]]\npass = 3", r"passes\[0\]: it needs a key 'pass'"),
        (STEP + '[[passes]]\npass = "fak"', r"passes\[1\]: unknown pass 'fak'; did you mean 'fake'\?"),
        (
            STEP + STEP + "bitz = 4",
            r"passes\[1\]: unknown key 'bitz'; fake has \['bits', 'mode', 'on', 'share', 'where'",
        ),
        (
            STEP + '[passes.where]\nops = "Conv"',
            r"passes\[0\].where: unknown key 'ops'; where has \['module', 'name', 'op', 'skip'\]",
        ),
        (STEP + "bits = 1", r"passes\[0\].bits: .*greater than or equal to 2.*\(got 1\)"),
        (STEP + 'bits = "4"', r"passes\[0\].bits: .*valid integer.*\(got '4'\)"),
        (STEP + "bits = 4.0", r"passes\[0\].bits: .*valid integer"),
        (STEP + "bits = true", r"passes\[0\].bits: .*valid integer"),
        (STEP + "on = 1", r"passes\[0\].on: .*valid boolean"),
        (STEP + 'mode = "quick"', r"passes\[0\].mode: .*'fast' or 'slow'.*\(got 'quick'\)"),
        (STEP + "where = 3", r"passes\[0\].where: .*\(got 3\)"),
        (STEP + "[passes.where]\nop = 3", r"passes\[0\].where.op: .*\(got 3\)"),
        (STEP + "[passes.where]\nop = [3]", r"passes\[0\].where.op.0: .*valid string"),
        (STEP + '[passes.where]\nop = "re:("', r"passes\[0\]: 're:\(' is not a regular expression"),
        ('[[passes]]\npass = "quantize"\npercentile = nan', r"passes\[0\].percentile: "),
        ("passes = [", "is not valid TOML"),
        ("x = " + "[" * 5000, "is not valid TOML"),
    ],
)
def test_errors_name_the_place(fake, text, message):
    with pytest.raises(RecipeError, match=message):
        recipe(text)


def test_every_mistake_of_a_pass_is_named(fake):
    with pytest.raises(RecipeError) as caught:
        recipe(STEP + 'bits = 1\nmode = "quick"')
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("version", ["", "version = 2", "version = '1'", "version = true", "version = 0"])
def test_wrong_version(version):
    with pytest.raises(RecipeError, match=r"this onnxcomp reads 'version = 1'"):
        parse_recipe(f"{version}\npasses = []")


def test_unknown_recipe():
    with pytest.raises(RecipeError, match=r"unknown recipe 'int9'; did you mean 'int8'\?.* path of a .toml file"):
        load_recipe("int9")


def test_recipe_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe file"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "folder.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "binary.toml"))
    (tmp_path / "large.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(RecipeError, match="is refused"):
        load_recipe(str(tmp_path / "large.toml"))


# --- the registry behind it


def test_a_name_registered_twice(fake):
    fake("cleanup")
    with pytest.raises(RecipeError, match=r"'cleanup' is registered twice in onnxcomp.passes: .*uninstall one"):
        registry.load_pass("cleanup")


def test_the_same_entry_seen_twice_is_one(fake):
    fake("fake")
    assert registry.load_pass("fake") is Fake


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Duck", r"pass 'other' \(fake_passes:Duck\) is not a Pass"),
        ("Missing", r"pass 'other' \(fake_passes:Missing\) cannot be imported"),
        ("no_such_module_2:Pass", r"cannot be imported: No module named 'no_such_module_2'"),
    ],
)
def test_an_entry_that_is_no_pass(fake, value, message):
    fake("other", value)
    with pytest.raises(RecipeError, match=message):
        registry.load_pass("other")


def test_a_pass_is_no_target(fake):
    fake("odd", "Fake", registry.TARGETS)
    with pytest.raises(RecipeError, match=r"target 'odd' .* is not a Target"):
        registry.load_target("odd")


def test_every_registered_name_is_the_name_of_its_class():
    assert {n: registry.load_pass(n).name for n in registry.names(registry.PASSES)} == {
        n: n for n in registry.names(registry.PASSES)
    }
    assert {n: registry.load_target(n).name for n in registry.names(registry.TARGETS)} == {
        n: n for n in registry.names(registry.TARGETS)
    }
