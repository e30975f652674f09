"""Numbers and names as a reader wants to see them."""

from __future__ import annotations

from onnxcomp.profile import Latency


def size(value: float) -> str:
    """Bytes, e.g. `18.6 MB`."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: float) -> str:
    """A large number, e.g. `385 M`."""
    return _scaled(value, ("", "k", "M", "G", "T")).strip()


def milliseconds(value: float) -> str:
    """A time, e.g. `10.1 ms`, or in µs below 0.1 ms."""
    return f"{significant(value * 1e3)} µs" if 0 < value < 0.1 else f"{significant(value)} ms"


def spread(latency: Latency) -> str:
    """Median and range from the 25th to the 90th percentile."""
    return f"{milliseconds(latency.p50)} ({significant(latency.p25)}-{significant(latency.p90)})"


def percent(value: float) -> str:
    """A share; only exactly all is 100 %, and only exactly none is 0 %."""
    if 0.0 < value < 0.001:
        return "<0.1 %"
    if 0.999 < value < 1.0:
        return ">99.9 %"
    return f"{100.0 * value:.1f} %" if value not in (0.0, 1.0) else f"{100.0 * value:.0f} %"


def decibels(value: float) -> str:
    """An SQNR; the bounds of the scale in words."""
    return "exact" if value >= 200.0 else "no signal" if value <= -200.0 else f"{value:.1f} dB"


def significant(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 or magnitude == 0 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return f"{value:.{digits}f}"


def printable(text: str) -> str:
    """The text without control characters: names come from model files, which may hold terminal escapes."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000.0
        index += 1
    return f"{value:.0f} {units[0]}" if index == 0 else f"{significant(value)} {units[index]}"
