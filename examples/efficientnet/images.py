"""Natural images for EfficientNet-Lite0: crops of the pictures that scikit-learn and scikit-image bring along."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE = 224
CROPS = 8  # per picture

# No picture is in both. `china` and `flower` are scikit-learn's.
CALIBRATION = ("china", "astronaut", "rocket", "stereo_motorcycle", "coins", "brick")
EVALUATION = ("flower", "chelsea", "coffee", "hubble_deep_field", "camera", "gravel")


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """Feeds for calibration."""
    yield from _feeds(CALIBRATION, seed=0)


def evaluation() -> Iterator[dict[str, np.ndarray]]:
    """Feeds for evaluation, from other pictures."""
    yield from _feeds(EVALUATION, seed=1)


def picture(name: str) -> Image.Image:
    """A picture in RGB."""
    if name in ("china", "flower"):
        samples = load_sample_images()
        return Image.fromarray(samples.images[[f"{name}.jpg" in f for f in samples.filenames].index(True)])
    loaded = getattr(skimage.data, name)()
    array = loaded[0] if isinstance(loaded, tuple) else loaded  # the motorcycle is two pictures and a depth map
    return Image.fromarray(array).convert("RGB")


def central(image: Image.Image) -> Image.Image:
    """The central square, with the margin that the published accuracy was measured with."""
    side = round(min(image.size) * SIZE / (SIZE + 32))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def preprocess(image: Image.Image) -> np.ndarray:
    """Resizes a square to the network's input, scaled as the checkpoint was trained."""
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(((pixels - 127) / 128).transpose(2, 0, 1)[None])


def _feeds(names: tuple[str, ...], seed: int) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    for name in names:
        image = picture(name)
        yield {"image": preprocess(central(image))}
        for _ in range(CROPS - 1):
            yield {"image": preprocess(_crop(image, random))}


def _crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    shorter = min(image.size)
    side = int(shorter * random.uniform(0.5, 1.0))
    left = int(random.integers(0, image.width - side + 1))
    top = int(random.integers(0, image.height - side + 1))
    crop = image.crop((left, top, left + side, top + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop
