"""This machine, in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from onnxcomp.device import DeviceFacts
from onnxcomp.errors import DeviceError
from onnxcomp.targets.device.archive import write_folder
from onnxcomp.targets.device.artifacts import own_architecture
from onnxcomp.targets.device.facts import facts
from onnxcomp.targets.device.job import OUT, SCRIPT, Job
from onnxcomp.targets.device.jobs import JobDevice
from onnxcomp.targets.device.results import tail
from onnxcomp.targets.device.scripts import FACTS


class LocalDevice(JobDevice):
    """The machine that onnxcomp runs on."""

    kind: ClassVar[str] = "local"
    summary: ClassVar[str] = "this machine"

    @property
    def python(self) -> str:
        """The Python that runs this."""
        return sys.executable

    @property
    def known_arch(self) -> str:
        """Architecture of this machine."""
        return own_architecture()

    def check(self) -> DeviceFacts:
        """Asks this machine what it is."""
        done = subprocess.run(
            ["sh", "-c", FACTS, "onnxcomp", tempfile.gettempdir(), self.python],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        return facts(self.name, self.kind, done.stdout)

    def execute(self, job: Job, out: Path) -> tuple[int, str]:
        """Runs a job in a temporary folder."""
        return run_here(job, out, self.settings.timeout, self.name)


def run_here(job: Job, out: Path, timeout: float, where: str) -> tuple[int, str]:
    """Runs a job on this machine, as `JobDevice.execute` does.

    Raises:
        DeviceError: If it takes more than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="onnxcomp-job-") as folder, tempfile.TemporaryFile() as messages:
        write_folder(job.files, Path(folder))
        process = subprocess.Popen(
            ["sh", SCRIPT],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"the artifact was still running on {where} after {timeout:g} s; give the device a longer --timeout"
            ) from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if Path(folder, OUT).is_dir():
            shutil.move(Path(folder, OUT), out / OUT)
        return (code if code >= 0 else 128 - code), tail(messages)
