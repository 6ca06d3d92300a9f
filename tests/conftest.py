"""Fixtures for tests that drive a real daemon (`-m vm`, `-m node`); other kinds do not use them.

One namespace with one filled registry serves the whole session. Each module gets its own daemon, and each
test is followed by a check for leaks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from sandbox.vmm import virtiofsd
from tests.bench.containerd import Containerd
from tests.kit import cni, images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.namespace import Namespace
from tests.kit.registry import HOST, Registry
from tests.kit.scratch import scratch_dir, scratch_root

# A shell starts background commands with SIGINT and SIGQUIT ignored, nohup(1) with SIGHUP, and children
# inherit that. Tests send these signals, so they get their default action back.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)

# Servers of tests are on the loopback, which the proxy of a machine cannot reach.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost,::1")))

# `HUSK_TEST_RUNTIME=containerd` runs the same flows on containerd + runc, to see whether a test expects too
# much.
BASELINE = os.environ.get("HUSK_TEST_RUNTIME") == "containerd"

# `HUSK_TEST_RUST_VIRTIOFSD=PROGRAM` runs them with this virtiofsd in place of the installed one.
RUST = os.environ.get("HUSK_TEST_RUST_VIRTIOFSD", "")


@dataclass(frozen=True)
class Site:
    """What all daemons of a session share."""

    namespace: Namespace
    registry: Registry
    cni: Path
    leases: Path
    mirrors: Path


def fill(registry: Registry) -> None:
    """Push the images that the tests pull."""
    registry.push("husk/busybox", "1", images.busybox())
    registry.push("husk/web", "1", images.web())
    registry.push("husk/setuid", "1", images.setuid())
    registry.push("husk/meet", "1", images.meet())
    registry.push("husk/docker", "1", images.busybox("docker form", form=images.Form.DOCKER))
    platforms = [images.busybox("index", architecture=name) for name in ("arm64", "amd64")]
    registry.push_index("husk/index", "1", platforms)
    if BASELINE:
        registry.push("pause", "1", images.pause())


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """Make the session's namespace, registry, CNI configuration and mirrors."""
    with Namespace(scratch_root()) as namespace:
        if RUST:
            found = next(each for each in virtiofsd.PLACES if Path(each).exists())
            namespace.run("mount", "--bind", RUST, found)
            assert namespace.run(found, "--version").startswith("virtiofsd 1.")
        registry = Registry(namespace)
        try:
            fill(registry)
            directory = scratch_dir("site")
            leases = directory / "leases"
            conf = cni.write_bridge(directory / "cni", leases)
            yield Site(namespace, registry, conf, leases, registry.write_mirrors(directory / "certs.d"))
        finally:
            registry.close()


@pytest.fixture(scope="module")
def daemon(site: Site) -> Iterator[Daemon]:
    """Start a daemon for this module. Nothing may be left when its pods have been removed."""
    if BASELINE:
        baseline = Containerd(site.namespace, site.cni, site.mirrors)
        yield cast(Daemon, baseline)  # the part that the flows use
        baseline.close()
        return
    made = Daemon(site.namespace, site.cni, site.mirrors, leases=site.leases)
    made.start()
    before = made.census()
    yield made
    if made.alive:
        made.remove_all()
    left = made.leaks_since(before)
    made.close()
    assert left == [], made.evidence()


@pytest.fixture(scope="module")
def cri(daemon: Daemon) -> Cri:
    """Return the CRI client of the module's daemon, with the base image pulled."""
    daemon.cri.pull(f"{HOST}/husk/busybox:1")
    return daemon.cri


@pytest.fixture(scope="module")
def pod(cri: Cri, request: pytest.FixtureRequest) -> Pod:
    """Run one pod for all tests of a module that need nothing special of it."""
    return cri.run_pod(request.module.__name__.rpartition(".")[2].replace("_", "-"))


@pytest.fixture
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove the pods and containers that a test made, and fail it if anything else is left."""
    daemon: Daemon = request.getfixturevalue("daemon")
    for shared in ("cri", "pod"):
        if shared in request.fixturenames:
            request.getfixturevalue(shared)  # made before the census
    client = daemon.cri
    pods = {each.id for each in client.call("ListPodSandbox").items}
    containers = {each.id for each in client.call("ListContainers").containers}
    before = None if BASELINE else daemon.census()
    yield
    if not BASELINE and not daemon.alive:
        return  # the module's check follows
    for container in client.call("ListContainers").containers:
        if container.id not in containers:
            client.stop(container.id, timeout=0)
            client.remove(container.id)
    for each in client.call("ListPodSandbox").items:
        if each.id not in pods:
            client.stop_pod(each.id)
            client.remove_pod(each.id)
    if before is not None:
        assert daemon.leaks_since(before) == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the daemon's log and the guests' consoles to the report of a failed test."""
    report = yield
    daemon = getattr(item, "funcargs", {}).get("daemon")
    if report.failed and daemon is not None and hasattr(daemon, "evidence"):
        report.sections.append(("daemon", daemon.evidence()))
    return report
