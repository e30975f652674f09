"""CoreInfer: the neurons that a prompt uses most are chosen once, and the answer is computed with them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge, Gt, Le
from typing_extensions import override

from onnxcomp.errors import CalibrationError, PassError
from onnxcomp.model import has_external
from onnxcomp.passes._core_choice import Chooser
from onnxcomp.passes._core_clusters import CoreSets, k_means, most_frequent
from onnxcomp.passes._core_layers import MARK, Layer, Storage, find_layers
from onnxcomp.passes._core_weights import Gatherer, Reducer
from onnxcomp.passes._disk_weights import Spool
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied
from onnxcomp.target import Array

Share = Annotated[float, Gt(0.0), Le(1.0)]


@dataclass(frozen=True, kw_only=True)
class CoreNeurons(Pass):
    """Makes of a dense language model the three graphs that CoreInfer needs (Wang et al., arXiv 2410.18311).

    Each is made from the dense model, by this pass with the same keys but `stage`:

    * `prefill` is the dense model, which also puts out which neurons of each feed-forward block are core for the tokens
      of a run: `core_index.N`, int64 `(kept,)`, ascending, and for how many tokens each neuron is, `core_count.N`,
      float32 `(neurons,)`. Core of a token are the largest values that the last product of the block reads; core of a
      run are the neurons that are core of most tokens.
    * `gather` takes `core_index.N` to the weights of these neurons.
    * `decode` is the model whose blocks compute with weights that are inputs. They have the names of the outputs of
      `gather` and are bound once a prompt.

    A prompt goes through `prefill`, its neurons through `gather`, and further tokens through `decode`; all ops that are
    added are those of the ONNX standard. A batch shares one set of neurons, and padding counts as tokens do. Answers
    differ from those of the dense model unless `keep` is 1, with short prompts and smooth activations by much: measure
    it. Since inputs and outputs change, the graphs are not for a recipe that compares them with the original.

    Attributes:
        stage: See above.
        keep: Share of the neurons of a block that are kept.
        token_share: Share of a token's values, those that are zero or not considered aside, that are its core; the
            number is the same for all tokens of a run.
        values: What the largest values are taken of: all by `magnitude`, or `positive` ones as in the paper. Behind a
            ReLU that is the same; a gate lets large negative values through as well.
        skip_layers: Number of feed-forward blocks at the start that stay dense.
        weights: How `gather` and `decode` store weights of the chosen neurons. `int8` has one scale an output channel
            and rounds the activations of a run to 8 bits. Weights in blocks cannot be inputs: onnxruntime's MatMulNBits
            and DequantizeLinear unpack them in every run, which takes longer than the whole dense product.
        clusters: Of `prefill`: instead of the run's own neurons it puts out those of the nearest of so many clusters
            of calibration prompts, and the cluster's number as `core_cluster`. One feed is one prompt. Better for
            prompts too short to show what they need.
        cluster_layer: Of all layers, how deep the one is by whose neurons clusters are told apart, from 0 to 1.
    """

    name: ClassVar[str] = "core_neurons"
    summary: ClassVar[str] = "CoreInfer: neurons chosen by the prompt, and a smaller model that decodes with them"
    min_opset: ClassVar[int] = 13  # ReduceSum takes its axes as input

    stage: Literal["prefill", "gather", "decode"] = "prefill"
    keep: Share = 0.4
    token_share: Share = 0.4
    values: Literal["magnitude", "positive"] = "magnitude"
    skip_layers: Annotated[int, Ge(0)] = 3
    weights: Storage = "float"
    clusters: Annotated[int, Ge(0)] = 0
    cluster_layer: Annotated[float, Ge(0.0), Le(1.0)] = 0.8

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        if self.clusters == 1:
            raise PassError("one cluster is the same set of neurons for every prompt; give 2 or more, or 0 for none")
        if self.clusters and self.stage == "prefill" and context.sweep is None:
            raise CalibrationError("clusters need calibration prompts; give some with --data")

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        where, skip = self.where, self.skip_layers
        layers, edits = find_layers(model, where, keep=self.keep, skip=skip, weights=self.weights)
        if not layers:
            return edits
        _check_names(model)
        bits = 7 if context.capabilities.reduce_range else 8
        if self.stage == "prefill":
            return [*edits, *self._choose(model, layers, context)]
        if self.stage == "gather":
            gatherer = Gatherer(model, self.weights, bits, Spool() if has_external(model) else None)
            for layer in layers:
                gatherer.add(layer)
            gatherer.finish()
            done = "{kept} of its {all} neurons, weights in {weights}"
        else:
            reducer = Reducer(model, self.weights, bits)
            for layer in layers:
                reducer.reduce(layer)
            done = "computes with {kept} of its {all} neurons, whose weights are inputs, in {weights}"
        detail = [done.format(kept=n.kept, all=n.block.hidden, weights=self.weights) for n in layers]
        edits += [applied(layer.node, text) for layer, text in zip(layers, detail, strict=True)]
        IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _choose(self, model: ir.Model, layers: Sequence[Layer], context: Context) -> list[Edit]:
        chooser = Chooser(model, self.token_share, magnitude=self.values == "magnitude")
        counts = {layer: chooser.counts(layer) for layer in layers}
        for layer in layers:
            layer.node.metadata_props[MARK] = self.stage
        if self.clusters:
            how = self._choose_cluster(model, chooser, counts, context)
        else:
            how = "that are core of most tokens"
            for layer, count in counts.items():
                chooser.most_frequent(layer, count, put_out=True)
        return [applied(n.node, f"puts out the {n.kept} of its {n.block.hidden} neurons {how}") for n in layers]

    def _choose_cluster(
        self, model: ir.Model, chooser: Chooser, counts: dict[Layer, ir.Value], context: Context
    ) -> str:
        observers = {str(value.name): CoreSets(layer.kept) for layer, value in counts.items()}
        assert context.sweep is not None
        context.sweep(model, observers)
        sets = [observer.sets() for observer in observers.values()]
        if len(sets[0]) < self.clusters:
            raise CalibrationError(f"{len(sets[0])} prompts make no {self.clusters} clusters; give more with --data")
        layers = list(counts)
        late = round(self.cluster_layer * (len(layers) - 1))
        found = k_means(sets[late], self.clusters, context.seed)
        own = chooser.most_frequent(layers[late], counts[layers[late]], put_out=False)
        centres = _per_cluster(sets[late], found, self.clusters)
        cluster = chooser.nearest(layers[late], own, counts[layers[late]], centres)
        for layer, members in zip(layers, sets, strict=True):
            rows = [most_frequent(c, layer.kept) for c in _per_cluster(members, found, self.clusters)]
            chooser.of_cluster(layer, cluster, np.stack(rows).astype(np.int64))
        sizes = ", ".join(map(str, np.bincount(found)))
        return f"of one of {self.clusters} clusters of prompts ({sizes}), by block {layers[late].number}"


def _per_cluster(sets: Array, found: Array, clusters: int) -> Array:
    """How often each neuron is in the sets of a cluster, relative to their number: float32 `(clusters, neurons)`."""
    return np.stack([sets[found == cluster].mean(axis=0) for cluster in range(clusters)]).astype(np.float32)


def _check_names(model: ir.Model) -> None:
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs)]
    taken = next((v.name for v in values if (v.name or "").startswith("core_")), None)
    if taken is not None:
        raise PassError(f"the model has a value called {taken!r}; names that begin with core_ are those of this pass")
