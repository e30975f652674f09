"""The node tests of the onnx package: cleanup changes no output, int8 does not crash, conversion of opsets is right.

Every case runs as it is, with all inputs but the first made weights, and with all inputs made weights, which folds it.
`python -m tests.corpus.test_nodes` runs all of them and prints the counts.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from onnxcomp.api import rewrite
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import load, save
from onnxcomp.opset import opset, raise_opset
from tests.corpus.harness import differences, run_all
from tests.corpus.node_cases import Case, node_cases, with_weights

RTOL = 1e-5
"""Of the largest magnitude of an output; 16-bit types are allowed four of their roundings."""

OPSETS = (13, 17, 21)


def variants(case: Case) -> Iterator[Case]:
    """The case as it is, and with inputs made weights."""
    yield case
    for keep in (1, 0):
        if (changed := with_weights(case, keep)) is not None:
            yield changed


def examine(case: Case, folder: Path) -> Iterator[str]:
    """What became of a case, one text a check; those that begin with `FAILED` are not right."""
    path, result = folder / "model.onnx", folder / "result.onnx"
    path.write_bytes(case.model.SerializeToString())
    try:
        before = run_all(path, [case.feed])
        run_all(path, [case.feed], optimize=True)
    except Exception:  # onnxruntime's exceptions have no common root
        yield "onnxruntime does not run it"
        return

    def compared(what: str) -> str:
        try:
            after = [run_all(result, [case.feed], optimize=o)[0] for o in (False, True)]
        except Exception as error:
            return f"FAILED {what}, {case.name}: {error}"
        found = [text for outputs in after for text in differences(before[0], outputs, RTOL)]
        return f"FAILED {what}, {case.name}: {found}" if found else f"{what}: same"

    try:
        rewrite(path, result, recipe="cleanup")
    except OnnxcompError as error:
        yield f"FAILED cleanup, {case.name}: refused, {error}"
    else:
        yield compared("cleanup")
    try:
        rewrite(path, result, recipe="int8", data=[case.feed])
    except OnnxcompError:
        yield "int8: refused"
    else:
        run_all(result, [case.feed], optimize=True)
        yield "int8: runs"
    for version in OPSETS:
        model = load(path)
        if opset(model) < version and "" in model.opset_imports:
            try:
                raise_opset(model, version)
            except OnnxcompError:
                yield "conversion: refused"
            else:
                save(model, result)
                yield compared("conversion")


def summary(cases: Iterable[Case]) -> Counter[str]:
    """How often what became of the cases."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            counts.update(examine(case, Path(folder)))
    return counts


def sample(step: int) -> Iterator[Case]:
    """Every variant of every case, or with a step above 1 one variant in turn of every so manieth case."""
    for index, case in enumerate(node_cases()[::step]):
        found = list(variants(case))
        yield from found if step == 1 else [found[index % len(found)]]


def _check(counts: Counter[str], least: int) -> None:
    failed = [text for text in counts if text.startswith("FAILED")]
    assert not failed, failed
    assert counts["cleanup: same"] > least
    assert counts["int8: runs"] > least
    assert counts["conversion: refused"] < 10, "a Scan over a batch cannot be converted, which is all there is"


def test_every_tenth_node_case():
    _check(summary(sample(10)), 120)


@pytest.mark.slow
def test_every_node_case():
    _check(summary(sample(1)), 4000)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for text, count in sorted(summary(sample(every)).items()):
        print(f"{count:6} {text}"[:400])
