"""The native custom-op library of onnxcomp (domain `onnxcomp.native`): where it is, and whether it was built.

It is optional. Without it every op runs through its function body, with the same results.
"""

from __future__ import annotations

from pathlib import Path

DOMAIN = "onnxcomp.native"
"""Domain of the ops in the library."""

_STEM = "onnxcomp_native"
_SUFFIXES = (".so", ".dylib", ".dll")


def library_path() -> Path | None:
    """Path of the library, to be given to `onnxruntime.SessionOptions.register_custom_ops_library`.

    Registering it more than once with the same options is harmless.

    Returns:
        The path, or None if the library was not built (no C++ compiler, or `ONNXCOMP_NO_NATIVE` was set on installing).
    """
    # In an editable install this package has two folders: the sources, and one in site-packages with the library.
    for folder in __path__:
        for suffix in _SUFFIXES:
            path = Path(folder) / (_STEM + suffix)
            if path.is_file():
                return path
    return None


def available() -> bool:
    """Whether the library was built."""
    return library_path() is not None
