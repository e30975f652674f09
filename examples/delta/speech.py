"""The voice-activity model silero-vad on speech with pauses: decisions and time of a step, as a stream.

    python -m examples.delta.speech [--max-error 0.02] [--repeat 5]

Thresholds are searched on the first quarter of the recording; decisions (probability of speech over one half) and times
are told of the rest. Steps of 32 ms, one thread, both models in turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from examples.assets import fetch
from onnxcomp import api
from onnxcomp.passes.carry import Carry
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.delta import Delta
from onnxcomp.target import Artifact, Feed
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.verbs.resolve import compiled

RATE, STEP, CONTEXT = 16000, 512, 64
_ROOT = Path(__file__).resolve().parents[2]


def silero() -> ir.Model:
    """silero-vad 6.2 (MIT), its hidden values listed as state."""
    path = fetch(
        "silero-vad",
        "6.2.0",
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
    )
    return api.rewrite(path, None, recipe=[Carry(state={"state": "stateN"})]).model


def speech() -> Iterator[Feed]:
    """A recording (`$ONNXCOMP_SPEECH`, else shared/data/silero_test.wav beside the project), 16 kHz mono, in steps."""
    path = os.environ.get("ONNXCOMP_SPEECH") or _ROOT.parent / "shared" / "data" / "silero_test.wav"
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise ValueError(f"{path} has to be 16 kHz mono with 16 bits")
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    for start in range(0, len(samples) - STEP + 1, STEP):
        yield {"input": padded[None, start : start + CONTEXT + STEP], "sr": np.array(RATE)}


def probabilities(artifact: Artifact, steps: list[Feed]) -> np.ndarray:
    """Probability of speech in every step."""
    session = OrtCpu().load(artifact)
    return np.array([session.run(s)["output"].item() for s in steps])


def main() -> None:
    """Prints what the stream costs and saves."""
    parser = argparse.ArgumentParser(prog="python -m examples.delta.speech", description=__doc__)
    parser.add_argument("--max-error", type=float, default=0.02)
    parser.add_argument("--repeat", type=int, default=5, help="passes through the recording")
    options = parser.parse_args()
    steps = list(speech())
    quarter = len(steps) // 4
    target, model = OrtCpu(), silero()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        search = Delta(max_error=options.max_error, frames=quarter)
        found = api.rewrite(model, None, recipe=[Cleanup(), search], data=steps[:quarter], samples=None)
        for edit in found.passes[-1].edits:
            if edit.action == "applied":
                print(f"{edit.node.split('/')[-2]:16} {edit.detail}" if edit.node else edit.detail)
        artifacts = {k: compiled(m, target, folder / k) for k, m in (("original", model), ("stream", found.model))}
        wanted, got = (probabilities(a, steps)[quarter:] for a in artifacts.values())
        print(
            f"{len(wanted)} steps, {len(wanted) * STEP / RATE:.0f} s, speech in {np.mean(wanted > 0.5):.0%}: same "
            f"decision in {np.mean((wanted > 0.5) == (got > 0.5)):.2%}; probabilities differ by "
            f"{np.abs(wanted - got).max():.3f} at most"
        )
        profile = api.profile_stream(
            folder / "stream", folder / "original", data=steps[quarter:], repeat=options.repeat, seconds=None
        )
        assert profile.baseline is not None
        print(f"a step takes {profile.baseline.p50 * 1e3:.0f} us, as a stream {profile.model.p50 * 1e3:.0f}")
        print(profile.verdict)


if __name__ == "__main__":
    main()
