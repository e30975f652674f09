"""What `doctor` says of TVM, whose two packages have to fit each other."""

from __future__ import annotations

import pytest

from onnxcomp import doctor


@pytest.mark.parametrize(
    ("versions", "states"),
    [
        ({"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}, ["ok"]),
        ({"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}, ["broken"]),
        ({"apache-tvm": "0.27.0.post1"}, ["broken"]),
        ({}, []),
    ],
)
def test_tvm_needs_the_right_version_of_its_other_half(monkeypatch, versions, states):
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, ""))
    found = doctor._tvm_ffi()
    assert [d.state for d in found] == states
    assert all(d.fix.startswith("pip install 'apache-tvm-ffi==0.1.14.") for d in found if d.state == "broken")
