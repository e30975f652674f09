"""How onnxruntime is imported."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("given", "value"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_the_environment_says_otherwise(tmp_path, given, value):
    code = (
        "import os, sys; from onnxcomp.targets.ort.runtime import onnxruntime; "
        "assert 'onnxruntime' not in sys.modules; onnxruntime(); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}\n"
    if given is None:
        assert list(tmp_path.iterdir()) == [], "switched on, it keeps a file here"
