"""The attributes of an epilogue."""

from __future__ import annotations

from onnxcomp.targets.tvm.convert._call import Call
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue


def epilogue(call: Call, *, residual: bool) -> Epilogue:
    """What the attributes `activation`, `alpha` and `beta` say."""
    return Epilogue(
        residual=residual,
        activation=call.text("activation"),
        alpha=float(call.attributes.get("alpha", 0.0)),
        beta=float(call.attributes.get("beta", 0.0)),
    )
