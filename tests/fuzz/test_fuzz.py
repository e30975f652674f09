"""A short run of the fuzzer over fixed cases, and one that hypothesis draws and shrinks; see `python -m tests.fuzz`."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import KINDS, run_case
from tests.fuzz.graphs import random_model
from tests.fuzz.properties import check_model


@pytest.mark.parametrize("kind", KINDS)
def test_some_cases(kind, tmp_path):
    counts = Counter(run_case(kind, number, tmp_path) for number in range(12))
    assert counts["same"] + counts["refused"] >= 6, "most cases are valid"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_cases(kind, tmp_path):
    counts = Counter(run_case(kind, number, tmp_path) for number in range(1000, 1100))
    assert counts["same"] + counts["refused"] >= 60
    assert counts["same"] >= (60 if kind == "graph" else 2)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.booleans())
def test_drawn_graphs(data, external):
    model, feeds = random_model(lambda bound: data.draw(st.integers(0, bound - 1)), 12)
    with tempfile.TemporaryDirectory() as folder:
        check_model(model, feeds, Path(folder), external)
