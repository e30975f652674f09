"""The commands for devices, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxcomp import cli_render
from onnxcomp.cli_options import Json
from onnxcomp.cli_render import working
from onnxcomp.templates.format import size

if TYPE_CHECKING:
    from onnxcomp.api import DeviceFacts, DeviceProfile, DeviceSpec

app = typer.Typer(name="devices", help="Devices that artifacts are run and measured on.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the device.")]


@app.command()
def add(
    name: Name,
    *,
    kind: Annotated[str, typer.Option("--kind", help="ssh, rpc or emulated.")],
    host: Annotated[str | None, typer.Option("--host", help="user@host, or a name of the ssh configuration.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the ssh or RPC server.")] = None,
    identity: Annotated[str | None, typer.Option("--identity", help="ssh: private key, if not the usual.")] = None,
    known_hosts: Annotated[str | None, typer.Option("--known-hosts", help="ssh: file with its host key.")] = None,
    folder: Annotated[str | None, typer.Option("--folder", help="ssh: folder there to work in, else /tmp.")] = None,
    arch: Annotated[str | None, typer.Option("--arch", help="ssh: architecture expected, as aarch64.")] = None,
    python: Annotated[str | None, typer.Option("--python", help="ssh: Python there, for ort-cpu.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="rpc: name that the server was started with.")] = None,
    root: Annotated[str | None, typer.Option("--root", help="emulated: folder with the libraries.")] = None,
    cpu: Annotated[str | None, typer.Option("--cpu", help="emulated: CPU model, by default max.")] = None,
    timeout: Annotated[int | None, typer.Option("--timeout", help="Seconds that one run may take in all.")] = None,
    as_json: Json = False,
) -> None:
    """Add a device; it is not reached before 'onnxcomp devices check'."""
    from onnxcomp import api

    given = {
        "host": host, "port": port, "identity": _absolute(identity), "known_hosts": _absolute(known_hosts),
        "folder": folder, "arch": arch, "python": python, "key": key, "root": _absolute(root), "cpu": cpu,
        "timeout": timeout,
    }  # fmt: skip
    spec = api.add_device(name, kind, **{k: v for k, v in given.items() if v is not None})
    if as_json:
        cli_render.show(spec, as_json)
    else:
        typer.echo(f"added {spec.name}: {_settings(spec)}; try: onnxcomp devices check {spec.name}")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List devices."""
    from onnxcomp import api

    devices = api.list_devices()
    if as_json:
        cli_render.show(devices, as_json)
    else:
        cli_render.names({name: _settings(spec) for name, spec in devices.items()}, as_json)


@app.command()
def check(name: Name, as_json: Json = False) -> None:
    """Reach a device, and show what it is."""
    from onnxcomp import api

    with working(as_json):
        found = api.check_device(name)
    facts(found, as_json)


@app.command()
def remove(name: Name) -> None:
    """Forget a device."""
    from onnxcomp import api

    api.remove_device(name)
    typer.echo(f"removed {name}")


def facts(found: DeviceFacts, as_json: bool) -> None:
    """Prints what a device told of itself."""
    if as_json:
        cli_render.show(found, as_json)
        return
    memory = f"{size(found.memory)}, {size(found.available)} of it free" if found.memory and found.available else ""
    rows = {
        "device": f"{found.device} ({found.kind})",
        "architecture": found.arch,
        "model": found.model,
        "cores": "" if found.cores is None else str(found.cores),
        "memory": memory,
        "folder": found.folder + ("" if found.free is None else f", {size(found.free)} free"),
        "python": found.python,
        "onnxruntime": found.onnxruntime or ("none: it cannot run artifacts of ort-cpu" if found.python else ""),
        "governor": found.governor,
        "temperature": "" if found.temperature is None else f"{found.temperature:.0f} C",
    }
    cli_render.table(("", ""), [(name, text) for name, text in rows.items() if text])
    for warning in found.warnings:
        cli_render.say(f"note: {warning}")


def device_profile(found: DeviceProfile, as_json: bool) -> None:
    """Prints what was measured on a device."""
    if as_json:
        cli_render.show(found, as_json)
        return
    if (times := found.latency) is not None:
        values = (times.median, times.p10, times.p90, times.p99, times.min, times.mean)
        cli_render.table(
            ("p50 ms", "p10 ms", "p90 ms", "p99 ms", "fastest ms", "mean ms", "runs"),
            [(*(f"{v:.3f}" for v in values), str(found.samples))],
        )
    parts = [f"load {found.load_ms:.1f} ms"] if found.load_ms is not None else []
    parts += [f"first run {found.first_ms:.3f} ms"] if found.first_ms is not None else []
    parts += [f"peak memory {size(found.peak_memory)}"] if found.peak_memory is not None else []
    parts += [f"{found.threads} thread(s)"] if found.threads else []
    cli_render.say(", ".join([*parts, f"{found.target} on {found.device} ({found.kind})"]))
    state = [f"governor {found.governor}"] if found.governor else []
    if found.temperatures:
        state.append(f"{found.temperatures[0]:.0f} C before and {found.temperatures[1]:.0f} C after")
    if state:
        cli_render.say(", ".join(state))
    if found.note:
        cli_render.say(found.note)


def _absolute(path: str | None) -> str | None:
    """A path as it is to be kept, since the next command may be given in another folder."""
    return None if path is None else str(Path(path).expanduser().absolute())


def _settings(spec: DeviceSpec) -> str:
    return ", ".join([spec.kind, *(f"{name.replace('_', '-')} {value}" for name, value in spec.settings.items())])
