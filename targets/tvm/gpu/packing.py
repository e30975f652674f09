"""Puts machine code in place of CUDA source into what is linked: a device then needs no compiler.

TVM writes a module of kernels as its source, to be compiled when it is loaded. Its form is a format, a table of the
kernels, and the code, each text behind its length.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.runtime import _ffi_api

from onnxcomp.errors import CompileError
from onnxcomp.targets.tvm.gpu.nvcc import compile_fatbin

_KIND = b"cuda"
_FORMAT = b"fatbin"
_COMPILED = (b"cubin", _FORMAT, b"ptx")
_CALLBACK = "tvm_callback_cuda_compile"

_lock = threading.Lock()


def pack_imports(arch: str) -> Callable[..., str]:
    """What writes the imported modules of a library, for `export_library`.

    Args:
        arch: Architecture of the GPU.
    """

    def write(module: Any, _: bool, prefix: str, folder: str) -> str:
        text = _ffi_api.ModulePackImportsToC(module, False, prefix)
        blob = bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})(?![0-9a-f])", text))
        (length,) = struct.unpack_from("<Q", blob)
        if length != len(blob) - 8:
            raise CompileError("TVM writes imported modules in a form that is not known")
        blob = blob[8:]
        found = _of_cuda(module)
        if len(found) > 1:
            raise CompileError("TVM made several modules of kernels, and one is expected")
        for kernels in found:
            source = kernels.inspect_source()
            blob = with_code(blob, source, partial(compile_fatbin, source, arch))
        symbol = re.search(r"const unsigned char (\w+)\[", text)
        assert symbol is not None
        return _assembly(Path(folder), symbol[1], struct.pack("<Q", len(blob)) + blob)

    return write


def with_code(blob: bytes, source: str, code: Callable[[], bytes]) -> bytes:
    """The modules `blob` with machine code in place of `source`.

    Where TVM finds a GPU, it has compiled the source already, and nothing is changed.

    Args:
        blob: What `ModulePackImportsToC` writes, without its length.
        source: Of the kernels.
        code: Compiles it.

    Raises:
        CompileError: If the blob has not the form that is known, or the compiler fails.
    """
    problem = CompileError("TVM writes a module of kernels in a form that is not known")
    kind, given = _text(_KIND), _text(source.encode())
    at = blob.find(kind) + len(kind)
    if at < len(kind) or len(blob) < at + 16:
        raise problem
    (length,), (name,) = struct.unpack_from("<Q", blob, at), struct.unpack_from("<Q", blob, at + 8)
    body = blob[at + 8 : at + 8 + length]
    if body[8 : 8 + name] in _COMPILED:
        return blob
    if not body.startswith(kind) or not body.endswith(given):
        raise problem
    body = _text(_FORMAT) + body[len(kind) : -len(given)] + _text(code())
    return blob[:at] + struct.pack("<Q", len(body)) + body + blob[at + 8 + length :]


@contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Lets TVM compile kernels as we do, where it does so itself: by its own flags they would not be exact."""
    with _lock:
        original = tvm.get_global_func(_CALLBACK)
        tvm_ffi.register_global_func(_CALLBACK, lambda source: compile_fatbin(str(source), arch), override=True)
        try:
            yield
        finally:
            tvm_ffi.register_global_func(_CALLBACK, original, override=True)


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _of_cuda(module: Any) -> list[Any]:
    found = [m for m in module.imports if m.kind == "cuda"]
    return found + [kernels for m in module.imports for kernels in _of_cuda(m)]


def _assembly(folder: Path, symbol: str, blob: bytes) -> str:
    """Writes bytes as an assembler file; as C, megabytes of them would take a compiler minutes."""
    data, path = folder / "imports.bin", folder / "imports.s"
    data.write_bytes(blob)
    path.write_text(
        f".section .rodata\n.global {symbol}\n.type {symbol}, %object\n.size {symbol}, {len(blob)}\n"
        f'.balign 16\n{symbol}:\n.incbin "{data}"\n.section .note.GNU-stack,"",%progbits\n',
        encoding="utf-8",
    )
    return str(path)
