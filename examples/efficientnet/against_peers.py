"""EfficientNet-Lite0 as other toolkits quantize it by themselves, and what `legalize` makes of their files.

    python -m examples.efficientnet.against_peers [--tools quark nncf] [--folder FOLDER] [--rounds 60] [--make-only]

Each tool is installed into a virtual environment of its own under the folder (several GB for all; those that need
PyTorch take most of it) and writes its files to `models`. What is there already is not made again. Then each file is
rewritten, timed before and after, interleaved with the float model on one thread, and compared on pictures that
calibration did not see. Times are over that of the float model; SQNR is in dB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from examples.efficientnet import _peers
from examples.efficientnet.against_ort import IMAGES, THREADS
from onnxcomp import api
from onnxcomp.target import Audit

_TIMEOUT = 1800  # seconds, of an installation or of one quantization
_COLUMNS = f"{'':20} {'time/fp32':>13} {'int8 convs':>13} {'SQNR to float':>13} {'agree':>13} {'after/before':>13}"


class ToolError(Exception):
    """A tool could not be installed, or did not write its file."""


def main() -> None:
    """Makes the files, then times, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=_peers.TOOLS, default=list(_peers.TOOLS))
    parser.add_argument("--folder", type=Path, default=_cache())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--make-only", action="store_true", help="stop when the tools have written their files")
    given = parser.parse_args()

    folder = given.folder.resolve()
    source, data = prepare(folder)
    files = list(make(given.tools, folder, source, data))
    if given.make_only:
        return
    print(_COLUMNS)
    for file in files:
        print(f"{file.stem:20} {attempt(file, source, data, given.rounds)}", flush=True)


def prepare(folder: Path) -> tuple[Path, Path]:
    """The float model and the calibration pictures, made unless they are there."""
    from examples.efficientnet.images import calibration

    folder.mkdir(parents=True, exist_ok=True)
    source, data = folder / "float.onnx", folder / "calibration.npz"
    if not data.is_file():
        images = [feed["image"] for feed in calibration()]
        np.savez(data, image=np.concatenate(images[:: len(images) // IMAGES][:IMAGES]))
    if not source.is_file():
        api.export("examples.efficientnet.model:model", source)
    return source, data


def make(tools: Sequence[str], folder: Path, source: Path, data: Path) -> Iterator[Path]:
    """Files of the tools, in turn; of a tool that fails the reason is printed."""
    for name in tools:
        tool = _peers.TOOLS[name]
        files = {mode: folder / "models" / f"{name}_{mode}.onnx" for mode in tool.modes}
        try:
            python = None if all(f.is_file() for f in files.values()) else installed(name, tool, folder)
        except ToolError as error:
            print(f"{name:20} not installed: {error}", flush=True)
            python = None
        for mode, file in files.items():
            if python is not None and not file.is_file():
                try:
                    quantize(f"{name}_{mode}", tool, python, source, data, file)
                except ToolError as error:
                    print(f"{file.stem:20} not made: {error}", flush=True)
            if file.is_file():
                yield file


def installed(name: str, tool: _peers.Tool, folder: Path) -> Path:
    """Interpreter of the virtual environment with the tool."""
    place = folder / "environments" / name
    python, done = place / "bin" / "python", place / "installed.txt"
    wanted = "\n".join((*((_peers.TORCH,) if tool.torch else ()), *tool.requirements, *tool.alone))
    if done.is_file() and done.read_text() == wanted:
        return python
    started = time.monotonic()
    log = _log(folder, f"{name}_install")
    _run([sys.executable, "-m", "venv", "--clear", str(place)], log)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    if tool.torch:
        # First, and held while the tool is installed: a tool that may choose takes the largest build there is.
        constraint = place / "constraint.txt"
        constraint.write_text(_peers.TORCH)
        _run([*pip, _peers.TORCH], log)
        pip += ["--constraint", str(constraint)]
    _run([*pip, *tool.requirements], log)
    if tool.alone:
        _run([*pip, "--no-deps", *tool.alone], log)
    done.write_text(wanted)
    print(f"{name:20} installed in {time.monotonic() - started:.0f} s", flush=True)
    return python


def quantize(name: str, tool: _peers.Tool, python: Path, source: Path, data: Path, out: Path) -> None:
    """Runs one mode of a tool in its environment; the file appears only when it is complete."""
    started = time.monotonic()
    out.parent.mkdir(exist_ok=True)
    # Some tools build code when first used, with programs that pip put beside the interpreter.
    path = os.pathsep.join((str(python.parent), os.environ.get("PATH", os.defpath)))
    # Beside the outputs, so that the file can be moved; some tools leave others where they run.
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch, out.name)
        # Isolated: neither a PYTHONPATH nor this folder's modules are found there.
        command = [str(python), "-I", _peers.__file__, name, str(source), str(data), str(made)]
        _run(command, _log(out.parents[1], name), {"PATH": path, **dict(tool.environment)}, scratch)
        made.replace(out)
    print(f"{name:20} made in {time.monotonic() - started:.0f} s", flush=True)


def attempt(file: Path, source: Path, data: Path, rounds: int) -> str:
    """The row of a file, or why there is none."""
    try:
        return row(file, source, data, rounds)
    except Exception as error:  # of whatever kind: a file that does not run must not cost the other rows
        return f"{type(error).__name__}: {_first_line(str(error))}"


def row(file: Path, source: Path, data: Path, rounds: int) -> str:
    """One row of the table: `before after` in each column but the last."""
    from examples.efficientnet.images import evaluation

    out = file.parents[1] / "legalized" / file.name
    out.parent.mkdir(exist_ok=True)
    found = api.legalize(file, out, data=data, reference=source, threads=THREADS)
    if found.path is None:
        return f"refused: SQNR {found.fidelity.worst_sqnr:.1f} dB to the original"
    times, sqnr, agreement = [], [], []
    for model in (file, out):
        ratio = api.profile(model, source, threads=THREADS, repeat=rounds).ratio
        assert ratio is not None
        output = api.compare(source, model, data=evaluation, layers=False).outputs[0]
        times.append(f"{ratio.median:6.3f}")
        sqnr.append(f"{output.sqnr:6.2f}")
        agreement.append(f"{output.top1:6.3f}")
    convs = [f"{_integer_convs(audit):6}" for audit in (found.before, found.after)]
    kept = api.compare(file, out, data=evaluation, layers=False).outputs[0].sqnr
    return " ".join(" ".join(pair) for pair in (times, convs, sqnr, agreement)) + f" {kept:13.2f}"


def _integer_convs(audit: Audit) -> int:
    return audit.executed_ops.get("QLinearConv", 0)


def _cache() -> Path:
    """A folder where `examples.assets` keeps what it fetches."""
    return Path(os.environ.get("ONNXCOMP_CACHE") or Path.home() / ".cache" / "onnxcomp") / "peers"


def _log(folder: Path, name: str) -> Path:
    log = folder / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    return log


def _run(
    command: Sequence[str], log: Path, environment: dict[str, str] | None = None, folder: str | None = None
) -> None:
    """Runs a command with its output in the log.

    Raises:
        ToolError: If it fails, with the last line it wrote, which in Python is the one that tells.
    """
    with log.open("a") as stream:
        try:
            done = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
                timeout=_TIMEOUT, env={**os.environ, **(environment or {})}, cwd=folder,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"not finished after {_TIMEOUT} s; see {log}") from error
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ToolError(f"{lines[-1].strip() if lines else f'exit status {done.returncode}'}; see {log}")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


if __name__ == "__main__":
    main()
