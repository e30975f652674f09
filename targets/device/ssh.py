"""A device that is reached by the user's own ssh, with the keys and the known hosts of the user.

One connection does all: the job goes in by its stdin, the outputs come back by its stdout, and as long as stdin is open
the device knows that somebody waits for them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, ClassVar

from onnxcomp.device import DeviceFacts, Settings
from onnxcomp.errors import DeviceError
from onnxcomp.targets.device import archive, scripts
from onnxcomp.targets.device.artifacts import architecture
from onnxcomp.targets.device.facts import facts
from onnxcomp.targets.device.job import Job
from onnxcomp.targets.device.jobs import JobDevice
from onnxcomp.targets.device.results import tail
from onnxcomp.targets.device.ssh_errors import SshSettings, failed, unreachable, where_is

_CONNECT = 10
_SLOWEST = 50_000
"""Bytes a second below which sending a job is given up."""
_GRACE = 10
"""Seconds in which a device is to end after it was told to."""
_SPARE = 1 << 20
"""Bytes that outputs and logs may need beside the job."""


class SshDevice(JobDevice):
    """A device with an ssh server, a POSIX shell, tar, and for artifacts of ort-cpu Python with onnxruntime."""

    kind: ClassVar[str] = "ssh"
    summary: ClassVar[str] = "a machine that is reached by ssh"
    settings_type: ClassVar[type[Settings]] = SshSettings
    settings: SshSettings

    @property
    def python(self) -> str:
        """What runs Python there."""
        return self.settings.python

    @property
    def known_arch(self) -> str:
        """Architecture, if it is set."""
        return architecture(self.settings.arch or "")

    def check(self) -> DeviceFacts:
        """Reaches the device and asks what it is."""
        script = scripts.command(scripts.FACTS, self.settings.folder or "", self.python)
        try:
            done = subprocess.run(
                self._command(script),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env=_environment(),
                check=False,
                timeout=_CONNECT + 60,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{self._where} did not say what it is within {_CONNECT + 60} s") from error
        if done.returncode:
            raise unreachable(self.name, self.settings, done.stderr)
        found = facts(self.name, self.kind, done.stdout)
        if self.settings.arch and architecture(self.settings.arch) != found.arch:
            raise DeviceError(f"{self._where} is {found.arch}, not {self.settings.arch}: add it anew with its --arch")
        return found

    def execute(self, job: Job, out: Path) -> tuple[int, str]:
        """Sends a job, runs it there, and fetches its outputs; nothing is left there, whatever happens."""
        sent = archive.size(job)
        transfer = 60 + sent // _SLOWEST
        limit = self.settings.timeout
        need = (job.size + _SPARE) >> 10
        arguments = (job.arch, sent, need, transfer, limit, self.settings.folder or "")
        with tempfile.TemporaryFile() as results, tempfile.TemporaryFile() as messages:
            process = subprocess.Popen(
                self._command(scripts.command(scripts.JOB, *arguments)),
                stdin=subprocess.PIPE,
                stdout=results,
                stderr=messages,
                env=_environment(),
                start_new_session=True,  # an interrupt is for us, who then let the device end in good order
            )
            sender = _Sender(process, job)
            try:
                sender.start()
                code = process.wait(_CONNECT + transfer + limit + _GRACE)
            except subprocess.TimeoutExpired as error:
                raise DeviceError(
                    f"{self._where} gave no answer any more; what it still runs ends there by itself after {limit} s"
                ) from error
            finally:
                _end(process, sender)
            if sender.failed is not None and not isinstance(sender.failed, BrokenPipeError):
                raise DeviceError(f"the artifact cannot be sent to {self._where}: {sender.failed}") from sender.failed
            results.seek(0)
            found = _marked(results)
            if code == 0 and found is not None:
                archive.unpack(results, out, self.name)
                return found, tail(messages)
            raise failed(self.name, self.settings, code, tail(messages), job, _begun(results))

    @property
    def _where(self) -> str:
        return where_is(self.name, self.settings)

    def _command(self, script: str) -> list[str]:
        """The command line of ssh."""
        ssh = shutil.which("ssh")
        if ssh is None:
            raise DeviceError("there is no ssh on PATH; install the OpenSSH client")
        options = ["BatchMode=yes", f"ConnectTimeout={_CONNECT}", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
        # What the user's configuration may have for sessions by hand; errors only, since stderr is the runner's.
        options += ["RemoteCommand=none", "ClearAllForwardings=yes", "LogLevel=ERROR"]
        chosen = self.settings
        if chosen.known_hosts:
            options.append(f'UserKnownHostsFile="{Path(chosen.known_hosts).expanduser()}"')
        if chosen.identity:
            options.append("IdentitiesOnly=yes")
        line = [ssh, "-T", *(part for option in options for part in ("-o", option))]
        if chosen.port:
            line += ["-p", str(chosen.port)]
        if chosen.identity:
            line += ["-i", str(Path(chosen.identity).expanduser())]
        return [*line, "--", chosen.host, script]


class _Sender(threading.Thread):
    """Writes a job to the stdin of ssh, and leaves it open."""

    def __init__(self, process: subprocess.Popen[bytes], job: Job) -> None:
        super().__init__(daemon=True)
        self._process, self._job = process, job
        self.failed: OSError | None = None

    def run(self) -> None:
        """Writes it all."""
        if self._process.stdin is None:
            return
        try:
            archive.pack(self._job, self._process.stdin)
        except OSError as error:
            self.failed = error
            if not isinstance(error, BrokenPipeError):
                self._process.terminate()


def _end(process: subprocess.Popen[bytes], sender: _Sender) -> None:
    """Ends ssh: by the end of stdin, on which the device cleans up while the connection stands, else by force."""
    if process.poll() is None and not sender.is_alive():
        with suppress(OSError):
            if process.stdin:
                process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if sender.ident is not None:
        sender.join(_GRACE)
    with suppress(OSError):
        if process.stdin:
            process.stdin.close()


def _environment() -> dict[str, str]:
    """So that nothing asks for a password."""
    return {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}


def _marked(results: IO[bytes]) -> int | None:
    """Exit code of the job, with `results` left behind it; what a login shell prints before is skipped."""
    mark = scripts.RESULTS.encode()
    for line in results:
        first, _, code = line.strip().partition(b" ")
        if first == mark and code.isdigit():
            return int(code)
    return None


def _begun(results: IO[bytes]) -> str:
    """Folder of the job there; empty if it did not get as far."""
    results.seek(0)
    for line in results:
        first, _, folder = line.strip().partition(b" ")
        if first == scripts.BEGIN.encode():
            return folder.decode(errors="replace")
    return ""
