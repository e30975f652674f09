"""Every error that a user can cause derives from `OnnxcompError`.

The command line prints such an error as one message without a traceback and exits with code 2. A message says what is
wrong, where, and what to do about it.
"""

from __future__ import annotations


class OnnxcompError(Exception):
    """Root of all errors raised on purpose by onnxcomp."""


class RecipeError(OnnxcompError):
    """A recipe, or an option that stands for one, is not valid."""


class GraphError(OnnxcompError):
    """A model cannot be read, written, or is not a valid graph."""


class DataError(OnnxcompError):
    """Sample data cannot be read or does not fit the model's inputs."""


class PassError(OnnxcompError):
    """A pass cannot do its work on this model."""


class CalibrationError(OnnxcompError):
    """Statistics were asked for that calibration did not, or could not, collect."""


class TargetError(OnnxcompError):
    """A target refuses a model or fails to run it."""


class UnsupportedError(TargetError):
    """The target has no way to do what is asked."""


class CompileError(TargetError):
    """Compilation for the target failed."""


class DeviceError(TargetError):
    """The device is missing, unreachable, or failed while running."""
