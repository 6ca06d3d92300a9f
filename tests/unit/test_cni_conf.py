"""Which CNI configuration is in force, and what a plug-in gets of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from network.conf import NetworkConf, choose_version, execution_conf, find_conf, parse_conf
from network.errors import NetworkNotReady

BRIDGE = {"type": "bridge", "bridge": "cni0", "odd": {"kept": [1, 2.50]}}


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def conflist(name: str = "net", **fields: Any) -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "name": name, "plugins": [BRIDGE], **fields}


def parse(content: object, name: str = "a.conflist") -> NetworkConf:
    return parse_conf(json.dumps(content).encode(), Path(name))


def test_first_file_by_name_is_in_force(tmp_path: Path) -> None:
    write(tmp_path, "20-b.conflist", conflist("second"))
    write(tmp_path, "10-a.conf", {"cniVersion": "0.3.1", "name": "first", **BRIDGE})
    write(tmp_path, "00-readme.txt", "not a configuration")
    conf = find_conf(tmp_path)
    assert (conf.name, conf.version, [each.type for each in conf.plugins]) == ("first", "0.3.1", ["bridge"])


def test_invalid_first_file_is_not_skipped(tmp_path: Path) -> None:
    write(tmp_path, "10-a.conflist", "{")
    write(tmp_path, "20-b.conflist", conflist())
    with pytest.raises(NetworkNotReady, match=r"10-a\.conflist is not usable"):
        find_conf(tmp_path)


@pytest.mark.parametrize("exists", [True, False])
def test_missing_configuration_is_reported_with_the_directory(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path if exists else tmp_path / "absent"
    with pytest.raises(NetworkNotReady, match=str(directory)) as caught:
        find_conf(directory)
    assert caught.value.reason == "NetworkPluginNotReady"


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (conflist(plugins=[]), "a.conflist", "no plug-ins"),
        (conflist(), "a.conf", r"must end in \.conflist"),
        (conflist(name="../x"), "a.conflist", "not a valid network name"),
        (conflist(plugins=[{"type": "../sh"}]), "a.conflist", "not a valid plug-in name"),
        (conflist(plugins=[{"no": "type"}]), "a.conflist", "type"),
        (conflist(cniVersion="0.2.0"), "a.conflist", "0.3.0 to 1.1.0"),
        (conflist(cniVersion="2.0.0"), "a.conflist", "2.0.0 is not supported"),
        ({"name": "x", "plugins": [BRIDGE]}, "a.conflist", "cniVersion none"),
        ([1], "a.conflist", "object"),
    ],
)
def test_invalid_configuration_is_reported_with_its_problem(content: object, name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse(content, name)


def test_newest_common_version_is_chosen() -> None:
    assert choose_version("1.0.0", ("1.0.0", "1.1.0", "1.2.0")) == "1.1.0"
    assert choose_version("0.3.1", ()) == "0.3.1"
    assert choose_version("", ("0.4.0", "1.0.0")) == "1.0.0"


@pytest.mark.parametrize(("value", "truth"), [(True, True), ("true", True), (False, False), ("no", False)])
def test_boolean_fields_may_be_strings(value: object, truth: bool) -> None:
    conf = parse(conflist(disableCheck=value, disableGC=value))
    assert (conf.disable_check, conf.disable_gc) == (truth, truth)


def test_plugin_gets_only_declared_capabilities() -> None:
    plugin = {**BRIDGE, "capabilities": {"portMappings": True, "bandwidth": False}}
    conf = parse(conflist(plugins=[plugin]))
    values = {"portMappings": msgspec.Raw(b"[1]"), "bandwidth": msgspec.Raw(b"2"), "dns": msgspec.Raw(b"3")}
    extra = {"prevResult": msgspec.Raw(b'{"a":1}')}
    passed = json.loads(execution_conf(conf, conf.plugins[0], capabilities=values, extra=extra))
    assert passed == {
        **BRIDGE,
        "cniVersion": "1.0.0",
        "name": "net",
        "runtimeConfig": {"portMappings": [1]},
        "prevResult": {"a": 1},
    }


def test_configuration_without_capability_arguments_has_no_runtime_config() -> None:
    conf = parse(conflist(plugins=[{**BRIDGE, "capabilities": {"portMappings": True}}]))
    assert "runtimeConfig" not in json.loads(execution_conf(conf, conf.plugins[0]))


def test_sample_configuration_is_valid() -> None:
    path = Path(__file__).parents[2] / "deploy/cni/10-husk-bridge.conflist"
    conf = parse_conf(path.read_bytes(), path)
    assert [each.type for each in conf.plugins] == ["bridge", "portmap"]
    assert conf.plugins[1].capabilities == ("portMappings",)
