"""Devices that run jobs: what is the same for them wherever the job's folder is."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from onnxcomp.device import Device, DeviceLatency, DeviceProfile
from onnxcomp.errors import DeviceError
from onnxcomp.target import Array, Feed
from onnxcomp.targets.device.artifacts import DeviceArtifact, own_architecture
from onnxcomp.targets.device.job import OUT, Job, make_job
from onnxcomp.targets.device.results import check_code, read_figures, read_outputs, read_state


class JobDevice(Device):
    """A device that is given a folder and gives one back."""

    timed: ClassVar[bool] = True
    """Whether times mean something there."""
    note: ClassVar[str] = ""

    @abstractmethod
    def execute(self, job: Job, out: Path) -> tuple[int, str]:
        """Runs a job and leaves its outputs below the empty folder `out`.

        Returns:
            Exit code of its script, and the end of what it wrote to stderr.

        Raises:
            DeviceError: If the job could not be run to its end.
        """

    @property
    def python(self) -> str:
        """What runs Python there."""
        return "python3"

    @property
    def launcher(self) -> Sequence[str]:
        """Command that runs what runs the artifact."""
        return ()

    @property
    def known_arch(self) -> str:
        """Architecture, as far as it is known without asking the device; else empty."""
        return ""

    def arch(self) -> str:
        """Architecture; the device is asked if it is not known."""
        return self.known_arch or self.check().arch

    def refuse(self, artifact: DeviceArtifact) -> None:
        """Fails before any work where an artifact cannot run.

        Raises:
            DeviceError: With the reason.
        """
        if artifact.arch and self.known_arch and artifact.arch != self.known_arch:
            raise DeviceError(
                f"{self.name} is {self.known_arch}; {artifact.path} was compiled for {artifact.arch}: compile the "
                "model for this device, or run it on another one"
            )

    def run(self, artifact: Path, feeds: Sequence[Feed]) -> list[dict[str, Array]]:
        """Runs the artifact in folder `artifact` on feeds, one after another; state is carried from one to the next."""
        opened = DeviceArtifact(artifact)
        if not feeds:
            return []
        with tempfile.TemporaryDirectory(prefix="onnxcomp-device-") as folder:
            job, out = self._executed(opened, feeds, (), Path(folder))
            return read_outputs(out, job.steps, opened.outputs, self.name)

    def profile(
        self,
        artifact: Path,
        feed: Feed,
        *,
        threads: int = 1,
        warmup: int = 5,
        repeat: int = 50,
        seconds: float | None = 60.0,
    ) -> DeviceProfile:
        """Measures the artifact in folder `artifact` on one feed."""
        opened = DeviceArtifact(artifact)
        counts = (warmup, repeat) if self.timed else (0, 1)
        options = ["--warmup", str(counts[0]), "--repeat", str(counts[1])]
        options += ["--threads", str(threads)] if threads else []
        options += ["--seconds", f"{seconds:g}"] if seconds is not None else []
        with tempfile.TemporaryDirectory(prefix="onnxcomp-device-") as folder:
            _, out = self._executed(opened, [feed], options, Path(folder))
            figures = read_figures(out, 0, self.name)
            governor, temperatures = read_state(out)
        told = DeviceProfile(
            device=self.name,
            kind=self.kind,
            target=opened.target,
            threads=threads,
            latency=None,
            samples=0,
            note=self.note,
        )
        if not self.timed:
            return told
        if figures.latency_ms is None:
            raise DeviceError(f"the runner on {self.name} measured nothing")
        return DeviceProfile(
            **{
                **vars(told),
                "latency": DeviceLatency(**figures.latency_ms.model_dump()),
                "samples": figures.samples,
                "load_ms": figures.load_ms,
                "first_ms": figures.first_ms,
                "peak_memory": figures.peak_rss_bytes,
                "governor": governor,
                "temperatures": temperatures,
            }
        )

    def _executed(
        self, artifact: DeviceArtifact, feeds: Sequence[Feed], options: Sequence[str], folder: Path
    ) -> tuple[Job, Path]:
        """A job that ended well, and the folder of its outputs."""
        self.refuse(artifact)
        native = artifact.needs_native and self._has_our_library()
        if artifact.needs_native and not native:
            raise DeviceError(
                f"{artifact.path} needs the native library of onnxcomp, which is built for {own_architecture()} here; "
                f"{self.name} is of another architecture: compile for a TVM target, or rewrite without native ops"
            )
        scratch, out = folder / "scratch", folder / "returned"
        scratch.mkdir()
        out.mkdir()
        job = make_job(
            artifact, feeds, scratch, options=options, launcher=self.launcher, python=self.python, native_library=native
        )
        check_code(*self.execute(job, out), self.name)
        return job, out / OUT

    def _has_our_library(self) -> bool:
        from onnxcomp import native

        return native.available() and self.arch() == own_architecture()
