"""Settings of devices that are reached by ssh, and what to tell the user when one fails."""

from __future__ import annotations

from pydantic import Field

from onnxcomp.device import Settings
from onnxcomp.errors import DeviceError
from onnxcomp.targets.device import scripts
from onnxcomp.targets.device.job import Job
from onnxcomp.targets.device.results import last_line

_PATH = r'^[/~][^"%$\x00-\x1f\x7f]*$'  # ssh gives these characters a meaning of their own


class SshSettings(Settings):
    """How a device is reached by ssh.

    Attributes:
        host: `user@host`, or a name of the user's ssh configuration.
        port: Else that of the configuration.
        identity: Private key; else those that ssh tries by itself.
        known_hosts: File with the device's host key; else the user's.
        folder: Folder there in which jobs get theirs; else `$TMPDIR` or `/tmp`.
        arch: Architecture that is expected, as `uname -m` has it.
        python: Python there, for artifacts of ort-cpu.
    """

    host: str = Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:%-]*$", max_length=255)
    port: int | None = Field(default=None, ge=1, le=65535)
    identity: str | None = Field(default=None, pattern=_PATH)
    known_hosts: str | None = Field(default=None, pattern=_PATH)
    folder: str | None = Field(default=None, pattern=r"^/[^\x00-\x1f\x7f]*$")
    arch: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")
    python: str = Field(default="python3", pattern=r"^[^-\x00-\x1f\x7f][^\x00-\x1f\x7f]*$")


def where_is(name: str, settings: SshSettings) -> str:
    """What a message calls the device."""
    return f"device {name!r} ({settings.host})"


def failed(name: str, settings: SshSettings, code: int, said: str, job: Job, folder: str) -> DeviceError:
    """The error for an exit code of ssh or of the script there.

    Args:
        name: Of the device.
        settings: Of the device.
        code: Exit code.
        said: End of stderr.
        job: What was sent.
        folder: Of the job there; empty if it did not get as far.
    """
    where, last = where_is(name, settings), last_line(said)
    tar = next((line for line in said.splitlines() if line.startswith("tar:")), last)
    size = f"{job.size / 1e6:.1f} MB"
    texts = {
        scripts.NO_FOLDER: f"no folder can be made on {where}: {last}; set another with --folder",
        scripts.NOT_UNPACKED: (
            f"the artifact of {size} could not be unpacked on {where}, where {_kib(last)} are left: {tar}"
        ),
        scripts.WRONG_ARCH: (
            f"{where} is {last}; the artifact was compiled for {job.arch}: compile the model for this device"
        ),
        scripts.NO_SPACE: (
            f"{where} has {_kib(last)} free in {settings.folder or 'its temporary folder'}, and the artifact "
            f"needs {size}: free some, or set another folder with --folder"
        ),
        scripts.TIMED_OUT: (
            f"the artifact was still being sent, or running, on {where} when its time was up (--timeout "
            f"{settings.timeout} s); it was ended there and removed"
        ),
        scripts.ABANDONED: f"the connection to {where} was lost: {last}",
        scripts.ENDED: f"the run on {where} was ended from there",
    }
    if code in texts:
        return DeviceError(texts[code])
    if code in (0, 255) or code < 0:
        return unreachable(name, settings, said, folder)
    return DeviceError(f"the shell on {where} ended with {code}: {last}; it has to have a POSIX sh, tar and mktemp")


def unreachable(name: str, settings: SshSettings, said: str, folder: str = "") -> DeviceError:
    """The error for what ssh itself said; `folder` is that of the job there if it had begun."""
    where, last, host = where_is(name, settings), last_line(said), settings.host
    if folder:
        return DeviceError(
            f"{where} went away while the artifact ran there: {last or 'the connection was closed'}; if it still "
            f"lives, it removes {folder} by itself"
        )
    port = f" -p {settings.port}" if settings.port else ""
    if "HOST IDENTIFICATION HAS CHANGED" in said:
        return DeviceError(
            f"the host key of {where} is not the known one: somebody may be in between, or the device was set up "
            "anew; find out which before you remove the old key with: ssh-keygen -R"
        )
    if "Host key verification failed" in said or "host key is known" in said:
        return DeviceError(
            f"the host key of {where} is not known: {last}; compare and accept it once by hand with: "
            f"ssh{port} {host}, or give the file that has it with --known-hosts"
        )
    if "Permission denied" in said:
        return DeviceError(
            f"{where} refuses the key: {last}; give the right one with --identity, load it into the ssh agent if "
            "it has a passphrase, and look whether the device has it in authorized_keys"
        )
    return DeviceError(f"{where} cannot be reached: {last or 'ssh said nothing'}; try: ssh{port} {host}")


def _kib(text: str) -> str:
    return f"{int(text) * 1024 / 1e6:.1f} MB" if text.isdigit() else "too little"
