"""Files that real exporters wrote: each is computed as by ONNX Runtime, or refused with its reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from onnxcomp.errors import OnnxcompError
from onnxcomp.specs import input_specs
from onnxcomp.verbs.resolve import compiled, load_model, make_target

ROOT = Path(os.environ.get("ONNXCOMP_ZOO") or Path(__file__).parents[4] / "shared" / "zoo")
FILES = sorted(ROOT.glob("*.onnx"))
REFUSED = {
    "setback_setback": "TreeEnsemble",
    "stacker_stacker": "TreeEnsemble",
    "unet_simp_small": "OneHot",
    # Of these, open dimensions made 1 leave images that are smaller than a window.
    "ch_ppocr_mobile_v2.0_cls": "Reshape",
    "funcnet": "Reshape",
    "aecmos": "Reshape",
    "hibari": "shape_of",
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILES, reason=f"no models in {ROOT}; set ONNXCOMP_ZOO")]


def random(spec, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if spec.dtype.kind == "f":
        return rng.normal(size=shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_the_corpus(path, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {
        s.name: tuple(d if isinstance(d, int) and d > 0 else 1 for d in s.shape)
        for s in input_specs(load_model(path, None))
        if s.shape is not None
    }
    model = load_model(path, shapes)
    feed = {s.name: random(s, shapes[s.name], rng) for s in input_specs(model)}
    reason = next((why for name, why in REFUSED.items() if name in path.name), "")
    target, reference = make_target("tvm-cpu"), make_target("ort-cpu")
    if reason:
        with pytest.raises(OnnxcompError, match=reason):
            compiled(model, target, tmp_path / "tvm")
        return
    found = target.load(compiled(model, target, tmp_path / "tvm")).run(feed)
    for name, wanted in reference.load(compiled(model, reference, tmp_path / "ort")).run(feed).items():
        scale = float(np.abs(np.nan_to_num(wanted.astype(np.float64))).max(initial=0)) or 1.0
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-4 * scale)
