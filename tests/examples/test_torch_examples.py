"""The PyTorch examples: networks, weights and data belong together, and the exported files compute the same."""

import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.data import check_feed
from onnxcomp.export import export_module
from onnxcomp.model import load
from onnxcomp.select import Select
from onnxcomp.target import TensorSpec
from onnxcomp.targets.ort import reference_runner

pytest.importorskip("torch", reason="needs PyTorch")

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
IMAGE = TensorSpec(name="image", dtype=np.dtype(np.float32), shape=(1, 3, 224, 224))
CATS = range(281, 286)  # ImageNet


@pytest.fixture(scope="module")
def example():
    """Imports a module of the examples, which are found from the checkout's folder only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield lambda name: importlib.import_module(f"examples.{name}")


def exported(factory, path):
    result = export_module(factory, path, input_names=["image"], output_names=["logits"], runner=reference_runner)
    assert result.max_error < 1e-3
    return load(path)


def runs(model):
    return reference_runner(model, ["logits"])


def distinct(feeds):
    return len({f["image"].tobytes() for f in feeds})


@pytest.fixture(scope="module")
def images(example):
    pytest.importorskip("skimage", reason="needs scikit-image")
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    return example("efficientnet.images")


@pytest.fixture(scope="module")
def efficientnet(example, tmp_path_factory):
    pytest.importorskip("examples.assets", reason="needs the downloader of the examples")
    example("efficientnet.model")
    path = tmp_path_factory.mktemp("efficientnet") / "model.onnx"
    return exported("examples.efficientnet.model:model", path)


@pytest.fixture(scope="module")
def source(example):
    path = example("vit.model").weights()
    if not path.is_file():
        pytest.skip(f"the ViT is not at {path}: set ONNXCOMP_VIT")
    return path


@pytest.fixture(scope="module")
def data(example):
    module = example("vit.data")
    if not module.archive().is_file():
        pytest.skip(f"CIFAR-10 is not at {module.archive()}: set ONNXCOMP_CIFAR")
    return module


@pytest.fixture(scope="module")
def vit(source, tmp_path_factory):
    return exported("examples.vit.model:model", tmp_path_factory.mktemp("vit") / "model.onnx")


class TestEfficientNet:
    def test_graph(self, efficientnet):
        ops = Counter(n.op_type for n in efficientnet.graph)
        assert ops == {"Conv": 49, "Clip": 33, "Add": 9, "ReduceMean": 1, "Reshape": 1, "Gemm": 1}

    def test_module_paths(self, efficientnet):
        select = Select(module=("blocks.*.depthwise.conv",))
        assert [n.attributes["group"].as_int() > 1 for n in efficientnet.graph if select(n)] == [True] * 16

    def test_recognises_a_cat(self, efficientnet, images):
        feed = {"image": images.preprocess(images.central(images.picture("chelsea")))}
        assert int(runs(efficientnet)(feed)["logits"].argmax()) in CATS

    @pytest.mark.parametrize(("picture", "label"), [("coffee", 967), ("rocket", 657), ("flower", 985)])
    def test_recognises_other_pictures(self, efficientnet, images, picture, label):
        feed = {"image": images.preprocess(images.central(images.picture(picture)))}
        assert int(runs(efficientnet)(feed)["logits"].argmax()) == label

    @pytest.mark.parametrize("which", ["calibration", "evaluation"])
    def test_feeds(self, images, which):
        feeds = list(getattr(images, which)())
        assert len(feeds) >= 32
        assert distinct(feeds) == len(feeds)
        for feed in feeds:
            check_feed(feed, [IMAGE], which)
            assert -1 <= feed["image"].min() < feed["image"].max() <= 1
        assert distinct([*feeds, *getattr(images, which)()]) == len(feeds), "the crops are not the same every time"

    def test_no_picture_is_in_both(self, images):
        assert not set(images.CALIBRATION) & set(images.EVALUATION)


class TestVit:
    def test_graph_has_no_shape_arithmetic(self, vit):
        ops = Counter(n.op_type for n in vit.graph)
        assert not ops.keys() & {"Shape", "Slice", "Unsqueeze", "Squeeze", "Expand", "Where", "Erf", "Constant"}
        assert ops["Softmax"] == ops["Gelu"] == ops["Split"] == 12
        assert ops["LayerNormalization"] == 25
        assert ops["MatMul"] == 72

    @pytest.mark.parametrize(
        ("pattern", "ops"),
        [
            ("blocks.0.mlp.fc2", {"MatMul": 1, "Add": 1}),
            ("blocks.*.mlp.*", {"MatMul": 24, "Add": 24, "Gelu": 12}),
        ],
    )
    def test_module_paths(self, vit, pattern, ops):
        assert Counter(n.op_type for n in vit.graph if Select(module=(pattern,))(n)) == ops

    def test_computes_what_the_source_computes(self, vit, source, data, monkeypatch):
        monkeypatch.setenv("ONNXCOMP_LIMIT", "4")
        here, there = runs(vit), runs(load(source))
        for feed in data.evaluation():
            np.testing.assert_allclose(here(feed)["logits"], there(feed)["logits"], rtol=1e-4, atol=1e-4)

    def test_accuracy(self, vit, data, monkeypatch):
        monkeypatch.setenv("ONNXCOMP_LIMIT", "40")
        assert data.top1(runs(vit))["top1"] > 0.7

    def test_feeds(self, data, monkeypatch):
        monkeypatch.setenv("ONNXCOMP_LIMIT", "40")
        calibration, evaluation = list(data.calibration()), list(data.evaluation())
        assert len(calibration) == data.CALIBRATION
        assert len(evaluation) == 40
        for feed in calibration[:4] + evaluation[:4]:
            check_feed(feed, [IMAGE], "feed")
        assert distinct(calibration + evaluation) == len(calibration) + 40

    def test_enlarging_does_not_cut_off_between_the_directions(self, example):
        """The same as bicubic resampling in floating point, which was used to train the head."""
        torch = pytest.importorskip("torch")
        module = example("vit.data")
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        large = torch.nn.functional.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        np.testing.assert_allclose(module.preprocess(image), ((large - mean) / std).numpy(), atol=1e-4)
