"""How other toolkits make an int8 model of an ONNX file, each with the settings that it has by itself.

    python _peers.py MODE FLOAT.onnx CALIBRATION.npz OUT.onnx

`against_peers` runs this file with the interpreter of the tool's own virtual environment: onnxcomp is not installed
there, and nothing but numpy is in all of them. So every import of a tool is inside the function that needs it. The
folder of the output is theirs to leave files in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Tool:
    """What a tool is installed from, and what it makes.

    Attributes:
        requirements: What pip is asked for, pinned where the result depends on it.
        modes: Name to what makes the file from the float model and the calibration pictures.
        torch: Whether it needs PyTorch, which is then installed first.
        alone: What is installed without what it asks for; `requirements` has what of that is needed.
        environment: Variables that the tool is run with.
    """

    requirements: tuple[str, ...]
    modes: dict[str, Callable[[Path, Path, Path], None]]
    torch: bool = False
    alone: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


class Reader:
    """Pictures one after another, as the quantizers that descend from onnxruntime's ask for them."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)

    def rewind(self) -> None:
        self._feeds = feeds(self._data)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return feeds(self._data)


def feeds(data: Path) -> Iterator[dict[str, np.ndarray]]:
    """The calibration pictures, one a feed."""
    for image in np.load(data)["image"]:
        yield {"image": image[None]}


def onnxruntime_default(source: Path, data: Path, out: Path) -> None:
    """Signed activations, one scale a tensor; the model goes through its preprocessing, as it advises."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(Reader)
    prepared = out.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(out), Reader(data))


def quark_a8w8(source: Path, data: Path, out: Path) -> None:
    """Its preset for 8-bit activations and weights."""
    _quark("A8W8", source, data, out)


def quark_int8_cnn(source: Path, data: Path, out: Path) -> None:
    """Its preset for convolutional networks."""
    _quark("INT8_CNN_DEFAULT", source, data, out)


def _quark(preset: str, source: Path, data: Path, out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader
    from quark.onnx import ModelQuantizer, QConfig

    CalibrationDataReader.register(Reader)
    ModelQuantizer(QConfig.get_default_config(preset)).quantize_model(str(source), str(out), Reader(data))


def modelopt_int8(source: Path, data: Path, out: Path) -> None:
    """Ranges by maximum, and what is not quantized stays in 32-bit floats."""
    _modelopt("fp32", source, data, out)


def modelopt_int8_fp16(source: Path, data: Path, out: Path) -> None:
    """What is not quantized goes into 16-bit floats, as it does by itself."""
    _modelopt("fp16", source, data, out)


def _modelopt(rest: str, source: Path, data: Path, out: Path) -> None:
    from modelopt.onnx.quantization import quantize

    copied = out.with_name("float.onnx")  # it writes files of its own beside the model
    copied.write_bytes(source.read_bytes())
    quantize(
        str(copied), quantize_mode="int8", calibration_method="max", calibration_data=np.load(data)["image"],
        calibration_eps=["cpu"], high_precision_dtype=rest, output_path=str(out),
    )  # fmt: skip


def nncf_int8(source: Path, data: Path, out: Path) -> None:
    """Its defaults; the graph is simplified first, since NNCF does not match Clip as exporters write it."""
    import nncf
    import onnx
    import onnxslim

    model = onnxslim.slim(onnx.load(source))
    onnx.save(nncf.quantize(model, nncf.Dataset(list(feeds(data)))), out)


def aimet_int8(source: Path, data: Path, out: Path) -> None:
    """Its default configuration, written with QuantizeLinear and DequantizeLinear."""
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel

    simulated = QuantizationSimModel(onnx.load(source))
    simulated.compute_encodings(list(feeds(data)))
    onnx.save(simulated.to_onnx_qdq(), out)


def onnxsim_static(source: Path, data: Path, out: Path) -> None:
    """Its QuantizeLinear and DequantizeLinear form, of the simplified model."""
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(onnxsim.quantize_static(model, list(feeds(data))), out)


def onnxsim_qoperator(source: Path, data: Path, out: Path) -> None:
    """Its form with operators on integers, of the simplified model."""
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(onnxsim.quantize_qoperator(model, list(feeds(data))), out)


TORCH = "torch==2.13.0"

_UNDER_AIMET = (
    "onnx==1.23.2", "onnxruntime==1.32.0", "onnx-ir==1.1.0", "onnxscript==0.7.2", "numpy", "scipy", "pandas",
    "scikit-learn", "bokeh>=3.3", "hvplot>=0.10", "jinja2", "jsonschema", "osqp", "psutil", "pybind11", "pyyaml",
    "tqdm",
)  # fmt: skip

TOOLS = {
    "onnxruntime": Tool(
        requirements=("onnxruntime==1.32.0", "onnx==1.23.2", "sympy==1.14.0"),
        modes={"default": onnxruntime_default},
    ),
    "onnxsim": Tool(
        requirements=("onnxsim==0.8.1", "onnxruntime==1.32.0"),
        modes={"static": onnxsim_static, "qoperator": onnxsim_qoperator},
    ),
    "quark": Tool(
        requirements=("amd-quark==0.13", "onnxruntime==1.32.0"),
        modes={"a8w8": quark_a8w8, "int8_cnn": quark_int8_cnn},
        torch=True,
    ),
    "modelopt": Tool(
        requirements=("nvidia-modelopt[onnx]==0.47.0",),
        modes={"int8": modelopt_int8, "int8_fp16": modelopt_int8_fp16},
        torch=True,
    ),
    "nncf": Tool(
        requirements=("nncf==3.4.0", "openvino==2026.4.0", "onnx==1.23.2", "onnxruntime==1.32.0", "onnxslim==0.1.98"),
        modes={"int8": nncf_int8},
        environment=(("NNCF_CI", "1"),),  # else it reports its use over the network
    ),
    "aimet": Tool(
        requirements=_UNDER_AIMET,
        modes={"int8": aimet_int8},
        torch=True,
        alone=("aimet-onnx==2.42.0",),  # else onnx2torch comes along, and torchvision with it, which nothing here uses
    ),
}


if __name__ == "__main__":
    tool, mode = sys.argv[1].split("_", 1)
    TOOLS[tool].modes[mode](*map(Path, sys.argv[2:]))
