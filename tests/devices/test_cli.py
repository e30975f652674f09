"""The command line for devices."""

from __future__ import annotations

import json

import pytest


def test_add_list_check_remove(cli):
    code, out, err = cli("devices", "add", "board", "--kind", "ssh", "--host", "me@board", "--port", 2222)
    assert (code, err) == (0, "")
    assert "added board: ssh, host me@board, port 2222" in out
    code, out, _ = cli("devices", "list")
    assert code == 0
    assert "me@board" in out
    assert "local" in out
    code, out, _ = cli("devices", "list", "--json")
    assert json.loads(out)["board"]["settings"] == {"host": "me@board", "port": 2222}
    code, out, _ = cli("devices", "check", "local")
    assert code == 0
    assert "architecture" in out
    assert cli("devices", "remove", "board")[0] == 0
    assert "board" not in cli("devices", "list")[1]


def test_paths_are_kept_whole(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("devices", "add", "board", "--kind", "ssh", "--host", "h", "--identity", "key")[0] == 0
    found = json.loads(cli("devices", "list", "--json")[1])
    assert found["board"]["settings"]["identity"] == str(tmp_path / "key")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "board"), "unknown device 'board'"),
        (("remove", "board"), "unknown device 'board'"),
        (("add", "board", "--kind", "ssh"), "needs --host"),
        (("add", "board", "--kind", "telnet", "--host", "h"), "unknown kind of device"),
        (("add", "board", "--kind", "rpc", "--host", "h", "--identity", "x"), "has no setting 'identity'"),
    ],
)
def test_errors_end_with_two(cli, arguments, message):
    code, out, err = cli("devices", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_profile_prints_latencies(cli, artifact):
    code, out, err = cli("profile", artifact(), "--device", "local")
    assert (code, err) == (0, "")
    assert "p50 ms" in out
    assert "load 1.5 ms, first run 2.500 ms, peak memory 1.00 kB, 1 thread(s), tvm-cpu on local (local)" in out
    code, out, _ = cli("profile", artifact("other"), "--device", "local", "--json")
    assert json.loads(out)["latency"]["p90"] == 3.0


def test_profile_of_a_stream_is_for_this_machine(cli, artifact):
    code, _, err = cli("profile", artifact(), "--device", "local", "--stream")
    assert code == 2
    assert "--stream and --baseline" in err


def test_emulation_says_that_it_gives_no_timing(cli, artifact, monkeypatch):
    from onnxcomp.targets.device.artifacts import own_architecture
    from onnxcomp.targets.device.emulated import EmulatedDevice

    monkeypatch.setattr(EmulatedDevice, "known_arch", own_architecture())
    monkeypatch.setattr(EmulatedDevice, "launcher", ())
    cli("devices", "add", "arm", "--kind", "emulated")
    code, out, err = cli("profile", artifact(), "--device", "arm")
    assert (code, err) == (0, "")
    assert "emulation gives no timing" in out
    assert "ms" not in out
    code, out, _ = cli("profile", artifact("x"), "--device", "arm", "--json")
    found = json.loads(out)
    assert found["latency"] is None
    assert found["first_ms"] is None
    assert "no timing" in found["note"]
