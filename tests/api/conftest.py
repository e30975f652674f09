"""A fast recipe, feeds, and `api.compress` with fast defaults; tests get them as fixtures."""

import pytest

from onnxcomp import api
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.quantize import Quantize


@pytest.fixture
def fast():
    """Passes that quantize in little time."""
    return Cleanup(), Quantize(range="minmax", weight_range="minmax")


@pytest.fixture
def feeds(x):
    return [{"x": row[None]} for row in x]


@pytest.fixture
def compress(tmp_path, model_path, feeds, fast):
    """Compresses with fast defaults."""

    def call(model=model_path, out=tmp_path / "out", **options):
        return api.compress(model, out, **{"recipe": fast, "data": feeds, "measure": False, **options})

    return call
