"""What the ONNX Runtime target finds out about the CPU."""

from __future__ import annotations

import pytest

from onnxcomp.cpu import parse_cpuinfo
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.capabilities import reduce_range


def test_flags_are_those_of_the_first_core():
    text = "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert parse_cpuinfo(text) == {"fpu", "avx2", "avx512_vnni"}
    assert parse_cpuinfo("processor : 0\nFeatures : fp asimd asimddp\n") == {"fp", "asimd", "asimddp"}
    assert parse_cpuinfo("") == frozenset()


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", {"avx2", "avx512f"}, True),
        ("AMD64", set(), True),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("x86_64", {"avx512f", "avx512_vnni"}, False),
        ("aarch64", {"asimd"}, False),
        ("arm64", set(), False),
    ],
)
def test_reduce_range(machine, flags, expected):
    assert reduce_range(machine, frozenset(flags)) is expected


def test_capabilities():
    found = OrtCpu().capabilities()
    assert found.target == "ort-cpu"
    assert found.max_opset >= 21
    assert found.placements["Conv"].output
    assert not found.placements["MatMul"].output
    assert [p.name for p in OrtCpu().lowering()] == ["native_ops", "native_nm", "native_delta"]
