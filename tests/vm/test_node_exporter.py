"""Prometheus' node exporter, as Debian has it, reports the figures of the host from a pod in a VM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import programs
from tests.kit.cri import Cri
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

EXPORTER = f"{HOST}/husk/node-exporter:1"
PROGRAM = "/usr/bin/prometheus-node-exporter"
PORT = 9100


def host(source: str, target: str) -> api.Mount:
    propagation = api.PROPAGATION_HOST_TO_CONTAINER
    return api.Mount(host_path=source, container_path=target, readonly=True, propagation=propagation)


@pytest.mark.parametrize("apart", [False, True], ids=["root", "root-proc-sys"])
def test_node_exporter_in_a_pod_reports_the_figures_of_the_host(site: Site, cri: Cri, apart: bool) -> None:
    site.registry.push("husk/node-exporter", "1", programs.node_exporter())
    cri.pull(EXPORTER)
    proc, sys = "/host/proc", "/host/sys"
    mounts = [host("/", "/host")]
    if apart:
        proc, sys = "/p", "/s"
        mounts += [host("/proc", proc), host("/sys", sys)]
    paths = [f"--path.procfs={proc}", f"--path.sysfs={sys}", "--path.rootfs=/host"]
    pod = cri.run_pod("exporter")
    container = cri.run(
        pod, EXPORTER, [PROGRAM, f"--web.listen-address=127.0.0.1:{PORT}", *paths], mounts=mounts
    )
    fetch = ("wget", "-q", "-O", "-", f"http://127.0.0.1:{PORT}/metrics")
    text = eventually_sync(
        lambda: cri.exec(container, *fetch).stdout, until=lambda seen: "node_memory" in seen, timeout_s=60
    )
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    memory = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert float(figures["node_memory_MemTotal_bytes"]) == memory
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    assert float(figures["node_boot_time_seconds"]) == float(boot.split()[1])
    cpus = sum(name.startswith("node_cpu_seconds_total{") and 'mode="idle"' in name for name in figures)
    assert cpus == os.cpu_count()
    pressure = float(figures["node_context_switches_total"])
    again = cri.exec(container, *fetch).stdout.partition("\nnode_context_switches_total ")[2].split()[0]
    assert float(again) > pressure, "read again"
    sizes = [value for name, value in figures.items() if 'mountpoint="/"' in name and "_size_" in name]
    root = os.statvfs("/")
    assert [float(size) for size in sizes] == [root.f_blocks * root.f_frsize]
