"""A 64-bit ARM machine, emulated here: what it computes is what a real one would, but its times mean nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from onnxcomp.device import DeviceFacts, Settings
from onnxcomp.errors import DeviceError
from onnxcomp.targets.device.artifacts import DeviceArtifact
from onnxcomp.targets.device.job import Job
from onnxcomp.targets.device.jobs import JobDevice
from onnxcomp.targets.device.local import run_here

ARCH = "aarch64"
NO_TIMING = "emulated: outputs are those of the real CPU, but emulation gives no timing"
_QEMU = ("qemu-aarch64", "qemu-aarch64-static")
_ROOTS = ("/usr/aarch64-linux-gnu", "/usr/aarch64-linux-gnu/sys-root")
_LOADER = "lib/ld-linux-aarch64.so.1"


class EmulatedSettings(Settings):
    """What is emulated.

    Attributes:
        root: Folder with the system's libraries for this architecture; else where cross compilers have theirs.
        cpu: Model of the CPU, as `qemu-aarch64 -cpu help` lists it.
    """

    root: str | None = Field(default=None, pattern=r"^/[^\x00-\x1f\x7f]*$")
    cpu: str = Field(default="max", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,=+-]*$")


class EmulatedDevice(JobDevice):
    """An emulated CPU, for correctness only."""

    kind: ClassVar[str] = "emulated"
    summary: ClassVar[str] = "64-bit ARM in qemu: correctness, never timing"
    settings_type: ClassVar[type[Settings]] = EmulatedSettings
    settings: EmulatedSettings
    timed: ClassVar[bool] = False
    note: ClassVar[str] = NO_TIMING

    @property
    def launcher(self) -> Sequence[str]:
        """The emulator."""
        return (self._qemu(), "-L", str(self._root()), "-cpu", self.settings.cpu)

    @property
    def known_arch(self) -> str:
        """Architecture that is emulated."""
        return ARCH

    def refuse(self, artifact: DeviceArtifact) -> None:
        """Fails for what is not compiled for this architecture."""
        if not artifact.is_tvm:
            raise DeviceError(
                f"{self.name} runs TVM artifacts only; {artifact.path} is for {artifact.target}: compile the model for "
                "tvm-aarch64"
            )
        if artifact.gpu:
            raise DeviceError(f"{self.name} emulates a CPU; {artifact.path} is for a GPU of {artifact.gpu}")
        super().refuse(artifact)

    def check(self) -> DeviceFacts:
        """Looks whether the emulator and the libraries are there."""
        return DeviceFacts(
            device=self.name,
            kind=self.kind,
            arch=ARCH,
            model=f"{self._qemu()} -cpu {self.settings.cpu}",
            folder=str(self._root()),
            warnings=(NO_TIMING,),
        )

    def execute(self, job: Job, out: Path) -> tuple[int, str]:
        """Runs a job here, its runner in the emulator."""
        return run_here(job, out, self.settings.timeout, self.name)

    def _qemu(self) -> str:
        found = next((path for name in _QEMU if (path := shutil.which(name))), None)
        if found is None:
            raise DeviceError("there is no qemu-aarch64 on PATH; install it with: apt install qemu-user")
        return found

    def _root(self) -> Path:
        given = self.settings.root
        found = next((Path(r) for r in ((given,) if given else _ROOTS) if Path(r, _LOADER).exists()), None)
        if found is None:
            raise DeviceError(
                f"{given or _ROOTS[0]} has no {_LOADER}; give a folder with the libraries as --root, "
                "or install them with: apt install libc6-arm64-cross libstdc++6-arm64-cross"
            )
        return found
