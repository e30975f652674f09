"""Boards: data that comes with onnxcomp, the user's own, and the one that this machine is."""

from __future__ import annotations

import pytest

from onnxcomp.errors import RecipeError, TargetError
from onnxcomp.targets.tvm import TvmAarch64, TvmCpu
from onnxcomp.targets.tvm.boards import boards, machine
from onnxcomp.verbs.resolve import make_target

OWN = """
summary = "mine"
triple = "aarch64-linux-gnu"
cpu = "neoverse-n1"
lanes = 4
registers = 32
dot = "sdot"
memory_mib = 512
"""


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("avx2 fma avx512f avx512bw avx512vl avx512dq avx512_vnni", "x86-64-v4"),
        ("avx2 fma avx512f avx512bw avx512vl avx512dq", "x86-64-v3"),
        ("avx2 fma avx_vnni", "avx-vnni"),
        ("avx2 fma", "x86-64-v3"),
        ("sse4_2", "x86-64"),
    ],
)
def test_the_host_is_the_best_board_that_it_can_run(flags, name):
    assert machine("host", "x86_64", frozenset(flags.split())).name == name


@pytest.mark.parametrize(("flags", "name"), [("asimd asimddp", "cortex-a76"), ("asimd", "cortex-a72")])
def test_an_arm_host(flags, name):
    assert machine("host", "aarch64", frozenset(flags.split())).name == name


def test_boards_are_those_of_the_targets_architecture():
    assert "cortex-a55" in TvmAarch64.boards()
    assert "x86-64-v3" in TvmCpu.boards()
    assert not set(boards("aarch64")) & set(boards("x86_64"))
    assert make_target("tvm-aarch64:cortex-a55").capabilities().features == ("cortex-a55",)
    assert make_target("tvm-aarch64").capabilities().features == ("cortex-a76",)


def test_a_board_of_the_users_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    assert make_target(f"tvm-aarch64:{path}").capabilities().features == ("neoverse-n1",)
    with pytest.raises(TargetError, match="aarch64-linux-gnu; this target compiles for x86_64"):
        make_target(f"tvm-cpu:{path}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('dot = "sdot"', 'dot = "mma"', "dot: Input should be"),
        ("lanes = 4", "", "lanes: Field required"),
        ("lanes = 4", "lanes = 4\nspeed = 3", "speed: Extra inputs"),
        ('triple = "aarch64-linux-gnu"', 'triple = "aarch64; rm"', "triple: String should match"),
        ("lanes = 4", "lanes =", "cannot be read as a board"),
    ],
)
def test_a_board_that_is_not_valid(tmp_path, old, new, message):
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(TargetError, match=message):
        make_target(f"tvm-aarch64:{path}")


def test_an_unknown_board():
    with pytest.raises(RecipeError, match=r"unknown board 'cortex-a67'.*did you mean 'cortex-a76'"):
        make_target("tvm-aarch64:cortex-a67")
    with pytest.raises(RecipeError, match="'ort-cpu' has no boards"):
        make_target("ort-cpu:host")
    with pytest.raises(TargetError, match="cannot be read as a board"):
        make_target("tvm-cpu:nowhere.toml")
