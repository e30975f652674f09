"""What a device is: a machine that artifacts are run on, here or elsewhere, and what is learnt of it.

The core knows devices only through these types; implementations live in `onnxcomp.targets.device` and are found through
the entry point group `onnxcomp.devices`, by kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from onnxcomp.target import Array, Feed

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Names that a device may have."""


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A device as it is kept.

    Attributes:
        name: What the user calls it.
        kind: Entry point that implements it.
        settings: How to reach it and where to work there; each kind has its own.
    """

    name: str
    kind: str
    settings: Mapping[str, str | int] = field(default_factory=dict)


class Settings(BaseModel):
    """Settings that every kind has; a kind adds its own.

    Attributes:
        timeout: Seconds that one job may take there.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    timeout: int = Field(default=600, ge=1, le=86400)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a device told of itself; None and empty are what it did not tell.

    Attributes:
        device: Its name.
        kind: Its kind.
        arch: Architecture, as `uname -m` has it: `aarch64`, `x86_64`.
        model: Of the board or the CPU.
        cores: CPUs online.
        memory: Bytes of main memory.
        available: Bytes of it that are free for use.
        folder: Where jobs get their folders.
        free: Bytes free there.
        python: Version of the Python there.
        onnxruntime: Version of the onnxruntime that this Python imports.
        governor: Frequency governor of the first CPU.
        temperature: Of the hottest sensor, in degrees Celsius.
        warnings: What will stand in the way of runs or timings.
    """

    device: str
    kind: str
    arch: str = ""
    model: str = ""
    cores: int | None = None
    memory: int | None = None
    available: int | None = None
    folder: str = ""
    free: int | None = None
    python: str = ""
    onnxruntime: str = ""
    governor: str = ""
    temperature: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeviceLatency:
    """Wall time of one run on a device, in milliseconds: median, percentiles, fastest, mean."""

    median: float
    p10: float
    p90: float
    p99: float
    min: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What was measured on a device.

    Attributes:
        device: Its name.
        kind: Its kind.
        target: What the artifact was compiled for.
        threads: Threads a run; 0 if the runtime chose.
        latency: Of one run; None where it cannot be measured.
        samples: Runs that `latency` sums up.
        load_ms: Milliseconds to load the artifact.
        first_ms: Milliseconds of the first run.
        peak_memory: Peak resident bytes of the process.
        governor: Frequency governor of the device's first CPU.
        temperatures: Of its hottest sensor before and after, in degrees Celsius.
        note: What a reader of the figures has to know.
    """

    device: str
    kind: str
    target: str
    threads: int
    latency: DeviceLatency | None
    samples: int
    load_ms: float | None = None
    first_ms: float | None = None
    peak_memory: int | None = None
    governor: str = ""
    temperatures: tuple[float, float] | None = None
    note: str = ""


class Device(ABC):
    """A device of some kind.

    Args:
        name: What the user calls it.
        settings: Of the type `settings_type`.
    """

    kind: ClassVar[str]
    summary: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings

    @abstractmethod
    def check(self) -> DeviceFacts:
        """Reaches the device and asks what it is.

        Raises:
            DeviceError: If it cannot be reached.
        """

    @abstractmethod
    def run(self, artifact: Path, feeds: Sequence[Feed]) -> list[dict[str, Array]]:
        """Runs the artifact in folder `artifact` on feeds, one after another; state is carried from one to the next.

        Returns:
            Output name to array, one mapping a feed.

        Raises:
            DataError: If a feed does not fit.
            DeviceError: If the device cannot be reached or used, or the run fails there.
            TargetError: If the folder is not an artifact.
        """

    @abstractmethod
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
        """Measures the artifact in folder `artifact` on one feed.

        Args:
            artifact: The folder.
            feed: What every run takes.
            threads: Threads a run; 0 lets the runtime choose.
            warmup: Runs that do not count.
            repeat: Most runs that count.
            seconds: Most seconds of timing.

        Raises:
            DataError: If the feed does not fit.
            DeviceError: If the device cannot be reached or used, or the run fails there.
            TargetError: If the folder is not an artifact.
        """
