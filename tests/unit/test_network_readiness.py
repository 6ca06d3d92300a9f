"""Whether the network is ready: without a configuration, and when one appears, changes, or is invalid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from network import readiness
from network.attach import Networks
from network.errors import NetworkNotReady, Unsatisfiable
from network.spec import NetworkStatus
from tests.fakes.cni.space import make_request, write_fake
from tests.kit.eventually import eventually_sync

READY = NetworkStatus(ready=True)


@pytest.fixture
def networks(tmp_path: Path) -> Networks:
    write_fake(tmp_path, "faulty")
    return Networks(
        conf_dir=tmp_path / "net.d",
        bin_dirs=(tmp_path,),
        cache_dir=tmp_path / "cache",
        netns_dir=tmp_path / "ns",
    )


def configure(tmp_path: Path, plugin: str = "faulty", version: str = "1.0.0", **fields: object) -> Path:
    (tmp_path / "net.d").mkdir(exist_ok=True)
    path = tmp_path / "net.d/10-net.conflist"
    plugins = [{"type": plugin, **fields}]
    path.write_text(json.dumps({"cniVersion": version, "name": "net", "plugins": plugins}))
    return path


async def test_configuration_is_read_when_it_appears_or_changes(networks: Networks, tmp_path: Path) -> None:
    status = networks.status()
    assert (status.ready, status.reason) == (False, "NetworkPluginNotReady")
    assert str(tmp_path / "net.d") in status.message
    with pytest.raises(NetworkNotReady, match="no CNI configuration"):
        await networks.up(make_request())
    path = configure(tmp_path)
    assert networks.status() == READY
    path.write_text("{")
    assert "is not usable" in networks.status().message
    configure(tmp_path, plugin="missing")
    assert (
        "missing" in networks.status().message and "containernetworking-plugins" in networks.status().message
    )
    path.unlink()
    assert "no CNI configuration" in networks.status().message


def test_unchanged_configuration_is_not_read_again(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path)
    assert networks.status() == READY
    monkeypatch.setattr(readiness, "find_conf", None)
    assert networks.status() == READY


def test_status_of_plugins_of_1_1_decides(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "STATUS_INTERVAL_S", 0.0)
    log = tmp_path / "log"
    configure(tmp_path, version="1.1.0", log=str(log), on={"STATUS": "fail"})
    assert not networks.status().ready
    eventually_sync(lambda: "fabric is down" in networks.status().message)
    configure(tmp_path, version="1.1.0", log=str(log))
    eventually_sync(lambda: networks.status() == READY)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert {call["verb"] for call in calls} == {"STATUS"}
    assert set(calls[0]["variables"]) == {"CNI_COMMAND", "CNI_PATH"}


def test_older_plugins_have_no_status(networks: Networks, tmp_path: Path) -> None:
    configure(tmp_path, on={"STATUS": "fail"}, log=str(tmp_path / "log"))
    assert networks.status() == READY
    assert not (tmp_path / "log").exists()


def test_invalid_pod_cidr_is_rejected(networks: Networks) -> None:
    with pytest.raises(Unsatisfiable, match="pod_cidr"):
        networks.update_pod_cidr("10.0.0.0/16,nonsense")
    networks.update_pod_cidr("")
