"""Every registered pass holds the contract on every small model."""

from __future__ import annotations

import pytest

from onnxcomp.registry import PASSES, load_pass, names
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass


@pytest.mark.parametrize("name", names(PASSES))
def test_contract(name, example, capabilities):
    model, feed = example
    check_pass(load_pass(name)(), model, capabilities=capabilities, runner=reference_runner, data=[feed, feed])
