"""What is kept of devices."""

from __future__ import annotations

import pytest

from onnxcomp import api
from onnxcomp.errors import DeviceError, RecipeError
from onnxcomp.targets.device import store


def test_local_is_always_there():
    assert list(api.list_devices()) == ["local"]
    with pytest.raises(DeviceError, match="cannot be removed"):
        api.remove_device("local")
    with pytest.raises(DeviceError, match="there is a device 'local'"):
        api.add_device("local", "ssh", host="h")


def test_devices_are_kept_as_they_were_given():
    given = {"host": "pi@board.local", "port": 2222, "folder": '/data/"a b"\\ü', "python": "/opt/x/bin/python3"}
    api.add_device("pi-1", "ssh", **given)
    api.add_device("other", "emulated", cpu="cortex-a76")
    found = api.list_devices()
    assert list(found) == ["local", "pi-1", "other"]
    assert found["pi-1"].settings == given
    api.remove_device("pi-1")
    assert list(api.list_devices()) == ["local", "other"]
    assert store.path().is_file()
    assert list(store.path().parent.iterdir()) == [store.path()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs --host"),
        ({"host": "-oProxyCommand=touch /tmp/x"}, "cannot have --host"),
        ({"host": "a b"}, "cannot have --host"),
        ({"host": "h;id"}, "cannot have --host"),
        ({"host": "h", "port": 0}, "cannot have --port"),
        ({"host": "h", "folder": "relative"}, "cannot have --folder"),
        ({"host": "h", "folder": "/a\nb"}, "cannot have --folder"),
        ({"host": "h", "identity": "relative"}, "cannot have --identity"),
        ({"host": "h", "identity": "/a$(id)"}, "cannot have --identity"),
        ({"host": "h", "known_hosts": '/a"b'}, "cannot have --known-hosts"),
        ({"host": "h", "python": "-c"}, "cannot have --python"),
        ({"host": "h", "cpu": "max"}, "has no setting 'cpu'; there are timeout, host, port"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(DeviceError, match=message):
        api.add_device("board", "ssh", **settings)
    assert list(api.list_devices()) == ["local"]


@pytest.mark.parametrize("name", ["", "a b", "-x", "../x", "a.b", "x" * 65, "a\n"])
def test_names_that_are_refused(name):
    with pytest.raises(DeviceError, match="no name for a device"):
        api.add_device(name, "ssh", host="h")


def test_kind_that_is_not_there():
    with pytest.raises(RecipeError, match="unknown kind of device 'shh'; did you mean 'ssh'"):
        api.add_device("board", "shh", host="h")


def test_device_that_is_not_there():
    with pytest.raises(DeviceError, match=r"unknown device 'bord'.*devices add"):
        api.check_device("bord")


def test_name_that_is_taken():
    api.add_device("board", "ssh", host="h")
    with pytest.raises(DeviceError, match="devices remove board"):
        api.add_device("board", "ssh", host="h")


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "version = 2\n",
        "version = 1\nother = 1\n",
        "version = 1\ndevices = 1\n",
        "version = 1\n[devices]\nx = 1\n",
        'version = 1\n[devices."a b"]\nkind = "ssh"\n',
        'version = 1\n[devices.local]\nkind = "ssh"\n',
        "version = 1\n[devices.a]\nkind = 1\n",
        'version = 1\n[devices.a]\nkind = "ssh"\nhost = ["h"]\n',
        'version = 1\n[devices.a]\nkind = "ssh"\nport = true\n',
        "\xff",
    ],
)
def test_file_that_is_not_valid(text):
    store.path().parent.mkdir()
    store.path().write_bytes(text.encode("latin-1"))
    with pytest.raises(DeviceError, match=r"devices\.toml is not valid"):
        api.list_devices()


def test_kinds_have_summaries():
    assert {"local", "ssh", "rpc", "emulated"} <= api.list_device_kinds().keys()
