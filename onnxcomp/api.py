"""The verbs as Python functions: the public face of `onnxcomp.verbs`, where all wiring is."""

from __future__ import annotations

from onnxcomp.device import DeviceFacts, DeviceProfile, DeviceSpec
from onnxcomp.stream_profile import StreamProfile
from onnxcomp.verbs.compression import compress
from onnxcomp.verbs.devices import (
    add_device,
    check_device,
    list_device_kinds,
    list_devices,
    remove_device,
    run_on,
)
from onnxcomp.verbs.inspection import doctor, inspect, list_ops, list_passes, list_recipes, list_targets
from onnxcomp.verbs.legalization import legalize
from onnxcomp.verbs.measuring import calibrate_target, compare, profile
from onnxcomp.verbs.perplexity import Perplexity, perplexity
from onnxcomp.verbs.resolve import ModelLike, RecipeLike, Shapes
from onnxcomp.verbs.results import (
    Inspection,
    LayerSensitivity,
    Legalization,
    Profile,
    RewriteResult,
    Sensitivity,
)
from onnxcomp.verbs.rewriting import compile, export, rewrite
from onnxcomp.verbs.sensing import sensitivity
from onnxcomp.verbs.sparsity import SparsityProfile, sparsity
from onnxcomp.verbs.sparsity_page import write_sparsity_page
from onnxcomp.verbs.streaming import profile_stream, write_stream_page

__all__ = [
    "DeviceFacts",
    "DeviceProfile",
    "DeviceSpec",
    "Inspection",
    "LayerSensitivity",
    "Legalization",
    "ModelLike",
    "Perplexity",
    "Profile",
    "RecipeLike",
    "RewriteResult",
    "Sensitivity",
    "Shapes",
    "SparsityProfile",
    "StreamProfile",
    "add_device",
    "calibrate_target",
    "check_device",
    "compare",
    "compile",
    "compress",
    "doctor",
    "export",
    "inspect",
    "legalize",
    "list_device_kinds",
    "list_devices",
    "list_ops",
    "list_passes",
    "list_recipes",
    "list_targets",
    "perplexity",
    "profile",
    "profile_stream",
    "remove_device",
    "rewrite",
    "run_on",
    "sensitivity",
    "sparsity",
    "write_sparsity_page",
    "write_stream_page",
]
