"""A node in new namespaces: a registry, Husk, and a kubelet with Husk as its only runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit import cni, gotools, images
from tests.kit.daemon import Daemon
from tests.kit.kubelet import Kubelet, prepare_node
from tests.kit.leaks import Census
from tests.kit.namespace import Namespace
from tests.kit.registry import HOST, Registry
from tests.kit.scratch import scratch_dir, scratch_root

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
UNUSED = f"{HOST}/husk/unused:1"
RESERVED_CPU = "0"
MEMORY_EVICTION = {"memory.available": "100Mi"}
# their policies cannot be changed while a node has pods
MANAGERS: dict[str, object] = {
    "cpuManagerPolicy": "static",
    "cpuManagerReconcilePeriod": "1s",
    "reservedSystemCPUs": RESERVED_CPU,
    "memoryManagerPolicy": "Static",
    "evictionHard": MEMORY_EVICTION,
    "systemReserved": {"memory": "400Mi"},
    # as the manager requires: what is reserved for the system and for eviction
    "reservedMemory": [{"numaNode": 0, "limits": {"memory": "500Mi"}}],
}


@dataclass(frozen=True)
class Node:
    """What the tests of a node share."""

    namespace: Namespace
    daemon: Daemon
    kubelet: Kubelet
    shared: Path  # a directory of the host that pods mount as a volume
    before: Census  # taken before the first pod


@pytest.fixture(scope="package")
def node() -> Iterator[Node]:
    """Start the node once for the package."""
    with contextlib.ExitStack() as undo:
        namespace = undo.enter_context(Namespace(scratch_root()))
        registry = Registry(namespace)
        undo.callback(registry.close)
        registry.push("husk/busybox", "1", images.busybox())
        registry.push("husk/web", "1", images.web())
        registry.push("husk/unused", "1", images.busybox("unused"))
        directory = scratch_dir("node")
        prepare_node(namespace, directory)
        leases = directory / "leases"
        conf = cni.write_bridge(directory / "cni", leases)
        mirrors = registry.write_mirrors(directory / "certs.d")
        daemon = Daemon(namespace, conf, mirrors, leases=leases)
        undo.callback(daemon.close)
        daemon.start()
        before = daemon.census()
        for image in (BUSYBOX, WEB):
            daemon.cri.pull(image)
        kubelet = Kubelet(namespace, gotools.tool("kubelet"), daemon.socket, settings=MANAGERS)
        undo.callback(kubelet.close)
        kubelet.start()
        shared = directory / "shared"
        shared.mkdir()
        yield Node(namespace, daemon, kubelet, shared, before)


@pytest.fixture(autouse=True)
def leave_nothing() -> None:
    """Replace the leak check of other packages, which would start a second daemon; test_pods has its own."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs of kubelet and daemon to the report of a failed test."""
    report = yield
    node = getattr(item, "funcargs", {}).get("node")
    if report.failed and node is not None:
        report.sections.append(("kubelet", node.kubelet.log_text()[-8000:]))
        report.sections.append(("daemon", node.daemon.evidence()))
    return report
