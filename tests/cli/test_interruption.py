"""Ctrl-C and requests to end, in the middle of long work."""

import os
import signal
import subprocess
import sys
import time

import pytest

SLOW = """
import time
from pathlib import Path
import numpy as np

def feeds():
    for i in range(4):
        if any(Path().glob(".out.*")):  # calibration has begun
            Path("begun").touch()
            time.sleep(60)
        yield {"x": np.full((1, 8), i, np.float32)}
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_calibrating(tmp_path, output, snapshot, model_path, recipe_path, number, code):
    (tmp_path / "slow_feeds.py").write_text(SLOW)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = snapshot(output)
    names = {p.name for p in tmp_path.iterdir()}
    process = subprocess.Popen(
        [
            sys.executable, "-B", "-m", "onnxcomp", "compress", str(model_path), "-o", "out",
            "--data", "slow_feeds:feeds", "--recipe", str(recipe_path),
        ],
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert (out, err) == ("", "interrupted: nothing was written\n")
    assert snapshot(output) == before
    assert list(temporary.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == names | {"begun"}
