"""How much of a layer's own quantization error arrives at the outputs of a model, to first order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, redirect, replace_output, users
from onnxcomp.errors import CalibrationError
from onnxcomp.passes._sensitivity import Recorder, Trials
from onnxcomp.target import Array, Feed

_STEP = 0.25  # of the error: small enough to be linear, large enough for single precision
_PROBES = 1  # sets of random signs a feed
_FEEDS = 4


class Jacobian:
    """Weighs the error of each layer's output by the model's Jacobian behind it.

    With `v_c` the mean squared quantization error of channel `c` of a layer's output, and `J_c` the derivatives of the
    outputs by the elements of that channel, the weighted error is `sum_c v_c ||J_c||**2`: what independent errors of
    that size would do to the outputs if the model were linear. It is estimated without derivatives: the outputs are
    computed again with `z_i sqrt(v_c)` added to the elements `i` of the layer's output, times a small step, where `z_i`
    are random signs, since `E ||J D z||**2 = ||J D||_F**2` (Hutchinson 1990; used for Hessians of layers in HAWQ-V2,
    arXiv 1911.03852). Against the error measured with the layer quantized it leaves out what is alike in all elements
    (a mean that moved) and what errors large enough to change a decision do.

    Args:
        trials: Of the model.
        nodes: The layers.
    """

    def __init__(self, trials: Trials, nodes: Sequence[ir.Node]) -> None:
        runner, sample = trials.context.runner, trials.context.sample
        if runner is None or sample is None:
            raise CalibrationError("it needs calibration data; give some with --data")
        self._trials = trials
        self._runner = runner
        self._outputs = [v.name or "" for v in trials.model.graph.outputs if v.dtype is None or _floating(v.dtype)]
        self._seed = trials.context.seed
        self._feeds = _first_feeds(trials, sample)
        self._silence: dict[str, Array] = {}
        self._noises: dict[str, str] = {}
        if not self._outputs:
            return
        values = {n.name or "": n.outputs[0].name or "" for n in nodes}
        shown = trials.context.run_sample(trials.model, list(values.values()))
        noisy = trials.model.clone()
        editor = Editor(noisy)
        for index, node in enumerate(nodes):
            name = f"onnxcomp_noise_{index}"
            self._noises[node.name or ""] = name
            rank = shown[values[node.name or ""]].ndim
            self._silence[name] = np.zeros((1,) * rank, np.float32)  # a run with noise gives all elements
            noise = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * rank))
            noisy.graph.inputs.append(noise)
            _add(editor, noisy.graph.node(node.name or "").outputs[0], noise)
        self._run = runner(noisy, self._outputs)
        self._expected = [self._run({**feed, **self._silence}) for feed in self._feeds]

    def error(self, node: ir.Node, quantized: ir.Model) -> float:
        """Weighted squared error of one layer over the squared norm of the outputs, worst output.

        It is 0 if no output is floating point.

        Args:
            node: The layer, in the float model.
            quantized: The model in which that layer alone is quantized.
        """
        if not self._outputs:
            return 0.0
        name = node.name or ""
        before, after = node.outputs[0].name or "", quantized.graph.node(name).outputs[0].name or ""
        want, got = self._runner(self._trials.model, [before]), self._runner(quantized, [after])
        random = np.random.Generator(np.random.Philox(self._seed))
        noise = dict.fromkeys(self._outputs, 0.0)
        power = dict.fromkeys(self._outputs, 0.0)
        for feed, expected in zip(self._feeds, self._expected, strict=True):
            reference = want(feed)[before]
            size = _sizes(got(feed)[after] - reference, 1 if node.op_type == "Conv" else -1)
            for _ in range(_PROBES):
                signs = random.integers(0, 2, reference.shape).astype(np.float32) * 2.0 - 1.0
                moved = self._run({**feed, **self._silence, self._noises[name]: np.float32(_STEP) * size * signs})
                for output in self._outputs:
                    change = moved[output].astype(np.float64) - expected[output]
                    noise[output] += float((change**2).sum()) / _STEP**2
                    power[output] += float((expected[output].astype(np.float64) ** 2).sum())
        return max((noise[o] / power[o] for o in self._outputs if power[o]), default=0.0)


def _floating(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point()


def _first_feeds(trials: Trials, sample: Feed) -> list[Feed]:
    recorders = {name: Recorder() for name in sample}
    trials.sweep(trials.model, recorders, min(_FEEDS, trials.samples))
    count = len(next(iter(recorders.values())).arrays)
    return [{name: r.arrays[i] for name, r in recorders.items()} for i in range(count)]


def _sizes(error: Array, axis: int) -> Array:
    """Root of the mean squared error of each channel, to be broadcast against the error, float32."""
    axes = tuple(i for i in range(error.ndim) if i != axis % error.ndim)
    return np.asarray(np.sqrt(np.mean(np.asarray(error, np.float32) ** 2, axis=axes, keepdims=True)))


def _add(editor: Editor, value: ir.Value, noise: ir.Value) -> None:
    readers = users(value)
    total = editor.after(value, "Add", [value, noise], name=f"{value.name}_with_noise", like=value)
    redirect(value, total, readers)
    if value.is_graph_output():
        replace_output(value, total)
