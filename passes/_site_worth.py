"""Whether dropping a site's values makes it faster on a target, by what was measured there."""

from __future__ import annotations

from onnxcomp.break_even import Product
from onnxcomp.passes._site_weights import Storage
from onnxcomp.passes._sites import Site
from onnxcomp.target import Capabilities


def slower(site: Site, sparsity: float, weights: Storage, capabilities: Capabilities) -> str:
    """Why a site is computed slower, one token at a time, than by a dense product with weights of the same type.

    Returns:
        The reason; empty if it is faster, or nothing is known of the target or of products such as this one.
    """
    if weights == "keep" and site.dense.quantized:
        return ""
    kind = "fp32" if weights == "keep" else weights
    block = site.block
    gated = block is not None and block.gate is not None and site.observed is not site.dense.source
    dense = block.up.dense if gated and block is not None else site.dense
    product = Product(op="gated_mlp" if gated else "matmul", weights=kind, inputs=dense.inputs, outputs=dense.outputs)
    needed = product.break_even(capabilities.break_even, dense=kind)
    if needed is None or sparsity >= needed:
        return ""
    return (
        f"{sparsity:.0%} of its values would be dropped, and on {capabilities.target} that beats a dense {kind} one "
        f"of {dense.inputs}x{dense.outputs} from {needed:.0%} on"
    )
