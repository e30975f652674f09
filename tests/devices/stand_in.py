"""A stand-in for the runner of TVM artifacts, which copies its input or fails in some way."""

from __future__ import annotations

from pathlib import Path

from onnxcomp.targets.device.runner import RUNNER

STAND_IN = r"""#!/bin/sh
artifact=$1; shift; steps=1
while [ $# -gt 0 ]; do
  case $1 in --input) input=${2#*=} ;; --out) out=$2 ;; --steps) steps=$2 ;; esac
  shift 2
done
mode=$(cat "$artifact/mode")
case $mode in
  sleep) exec sleep 300 ;;
  children) sleep 300 & sleep 300 ;;
  illegal) kill -ILL $$ ;;
  die) kill -KILL $$ ;;
  refuse) echo "onnxcomp-run: no such input" >&2; exit 2 ;;
  elsewhere) echo "onnxcomp-run: wrong architecture" >&2; exit 3 ;;
  fill) mkdir -p "$out"; head -c 100000000 /dev/zero >"$out/0.npy" || exit 2 ;;
esac
mkdir -p "$out" && cp "$input" "$out/0.npy"
echo '{"load_ms": 1.5, "first_ms": 2.5, "latency_ms": {"median": 2.0, "p10": 1.0, "p90": 3.0, "p99": 4.0, "min": 1.0,
  "mean": 2.0}, "samples": 50, "threads": 1, "peak_rss_bytes": 1000, "steps": 1, "outputs": {"y": "0.npy"}}'
"""


def put_runner(folder: Path, text: str) -> None:
    """Puts a script into a folder as the runner."""
    (folder / RUNNER).write_text(text)
    (folder / RUNNER).chmod(0o755)
