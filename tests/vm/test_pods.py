"""Pods: boot, network, hostPort, DNS, sysctls, names, states, through the CRI on the real daemon."""

from __future__ import annotations

import ipaddress
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import REPOSITORY, Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
PAGE = "hello from the pod\n"


def code_of(fault: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    code = fault.value.code()
    assert isinstance(code, grpc.StatusCode)
    return code


def fetched(cri: Cri, site: Site, host: str, port: int = 80) -> str:
    """The page, as soon as the server listens."""

    def fetch() -> str:
        try:
            return str(site.namespace.fetch(host, port))
        except OSError:
            return ""

    return str(eventually_sync(fetch, timeout_s=20))


@pytest.fixture(scope="module")
def web_pod(cri: Cri) -> Pod:
    """A web server on port 80, published on the host's port 18080."""
    cri.pull(WEB)
    mapping = api.PortMapping(protocol=api.TCP, container_port=80, host_port=18080)
    pod = cri.run_pod("web", port_mappings=[mapping])
    cri.run(pod, WEB, name="httpd")
    return pod


def test_guest_kernel_is_not_the_hosts(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    release = cri.exec(container, "uname", "-r").stdout.strip()
    assert release
    assert release != platform.release()


def test_host_reaches_the_pod(cri: Cri, site: Site, web_pod: Pod) -> None:
    assert fetched(cri, site, cri.pod_ip(web_pod)) == PAGE


def test_every_address_of_the_pod_answers(cri: Cri, site: Site, web_pod: Pod) -> None:
    status = cri.pod_status(web_pod).status.network
    addresses = [status.ip, *(each.ip for each in status.additional_ips)]
    assert {ipaddress.ip_address(each).version for each in addresses} == {4, 6}
    assert [fetched(cri, site, each) for each in addresses] == [PAGE, PAGE]


def test_another_pod_reaches_the_pod(cri: Cri, pod: Pod, web_pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    answer = cri.exec(container, "wget", "-qO-", f"http://{cri.pod_ip(web_pod)}/")
    assert (answer.code, answer.stdout) == (0, PAGE)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.88.0.1"])
def test_host_port_reaches_the_pod(cri: Cri, site: Site, web_pod: Pod, host: str) -> None:
    assert fetched(cri, site, host, 18080) == PAGE


def test_pod_reaches_itself_by_its_own_address(cri: Cri, web_pod: Pod) -> None:
    container = cri.run(web_pod, BUSYBOX, ["sleep", "3600"])
    own = cri.exec(container, "wget", "-qO-", f"http://{cri.pod_ip(web_pod)}/")
    loopback = cri.exec(container, "wget", "-qO-", "http://127.0.0.1/")
    assert (own.stdout, loopback.stdout) == (PAGE, PAGE)


def test_dns_hostname_and_sysctls_are_those_of_the_request(cri: Cri) -> None:
    dns = api.DNSConfig(
        servers=["10.96.0.10", "10.96.0.11"], searches=["svc.cluster.test"], options=["ndots:5"]
    )
    linux = api.LinuxPodSandboxConfig(
        sysctls={"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "1024 65000"}
    )
    pod = cri.run_pod("environment", hostname="wanted-name", dns_config=dns, linux=linux)
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])

    resolv = cri.exec(container, "cat", "/etc/resolv.conf").stdout
    assert [line.split() for line in resolv.splitlines() if line] == [
        ["search", "svc.cluster.test"],
        ["nameserver", "10.96.0.10"],
        ["nameserver", "10.96.0.11"],
        ["options", "ndots:5"],
    ]
    assert cri.exec(container, "hostname").stdout == "wanted-name\n"
    assert cri.exec(container, "cat", "/etc/hostname").stdout == "wanted-name\n"
    assert cri.pod_ip(pod) in cri.exec(container, "cat", "/etc/hosts").stdout
    assert cri.exec(container, "cat", "/proc/sys/kernel/shm_rmid_forced").stdout == "1\n"
    ports = cri.exec(container, "cat", "/proc/sys/net/ipv4/ip_local_port_range").stdout
    assert ports.split() == ["1024", "65000"]


def test_status_and_list_show_the_request(cri: Cri) -> None:
    labels, notes = {"io.kubernetes.pod.uid": "u-1"}, {"note": 'any "text"'}
    pod = cri.run_pod("described", labels=labels, annotations=notes)
    status = cri.pod_status(pod).status
    assert status.state == api.SANDBOX_READY
    assert (status.metadata.name, status.metadata.namespace) == ("described", "default")
    assert (dict(status.labels), dict(status.annotations)) == (labels, notes)
    for found in ({"id": pod.id}, {"id": pod.id[:13]}, {"label_selector": labels}):
        items = cri.call("ListPodSandbox", filter=api.PodSandboxFilter(**found)).items
        assert [each.id for each in items] == [pod.id]
    assert not cri.call("ListPodSandbox", filter=api.PodSandboxFilter(id="0000")).items


def test_verbose_status_shows_the_phases_of_the_start(cri: Cri, pod: Pod) -> None:
    info = json.loads(cri.pod_status(pod, verbose=True).info["info"])
    assert info["phases"]
    assert all(phase["endSeconds"] >= phase["beginSeconds"] for phase in info["phases"])


def test_trace_draws_host_and_guest_until_the_first_exec(daemon: Daemon, cri: Cri) -> None:
    pod = cri.run_pod("traced")
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    cri.exec(container, "true")
    trace = json.loads(_husk(daemon, "trace", "traced", "--json"))
    names = [phase["name"] for phase in trace["phases"]]
    assert trace["podId"] == pod.id
    assert {"queue", "network", "container-plan", "container-start", "first-exec"} <= set(names)
    order = ("container-rootfs", "container-plan", "container-start", "first-exec")
    assert [name for name in names if name in order] == list(order)
    # a VM that was made ahead has booted before
    guest = [phase for phase in trace["phases"] if phase["side"] == "guest"]
    assert [phase["name"] for phase in guest] in ([], ["firmware", "kernel", "mounts", "modules", "channel"])
    last = max(phase["endSeconds"] for phase in trace["phases"] if phase["name"] in {"guest", "queue"})
    assert all(0 <= phase["beginSeconds"] <= phase["endSeconds"] <= last for phase in guest)
    assert f"default/traced ({trace['handler']}" in _husk(daemon, "trace", pod.id[:10])


def test_pooled_vm_has_run_a_warm_up_container_and_nothing_of_it_is_left(daemon: Daemon, cri: Cri) -> None:
    pod = cri.run_pod("warm")
    assert "without having run a container" not in daemon.log_text()
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    assert cri.exec(container, "true").code == 0
    shares = daemon.run_directory / "pods" / pod.id / "back" / "rootfs"
    assert {path.name for path in shares.iterdir()} == {container, "modules"}


def _husk(daemon: Daemon, *arguments: str) -> str:
    return subprocess.run(
        daemon.command(*arguments), cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout


def test_vm_is_sized_from_the_pods_resources(cri: Cri) -> None:
    gibibyte = 1 << 30
    resources = api.LinuxContainerResources(
        memory_limit_in_bytes=gibibyte, cpu_quota=200_000, cpu_period=100_000
    )
    pod = cri.run_pod("sized", linux=api.LinuxPodSandboxConfig(resources=resources))
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    assert int(cri.exec(container, "nproc").stdout) >= 2
    total = int(cri.exec(container, "awk", "/MemTotal/ { print $2 }", "/proc/meminfo").stdout)
    assert total > 0.9 * gibibyte / 1024


def test_vm_without_overhead_is_limited_by_the_host_and_the_limit_grows_with_it(
    daemon: Daemon, cri: Cri
) -> None:
    """A kubelet's cgroup, limited to the containers' memory alone, would be too small for it."""
    mebibyte = 1 << 20

    def limited_to(memory: int) -> api.LinuxContainerResources:
        return api.LinuxContainerResources(memory_limit_in_bytes=memory)

    linux = api.LinuxPodSandboxConfig(resources=limited_to(300 * mebibyte), cgroup_parent="/husk-unused")
    pod = cri.run_pod("host-limit", linux=linux)
    first, processes = host_limits(daemon, pod.id)
    assert 300 * mebibyte < first <= (300 + 1024) * mebibyte
    assert processes == 1024
    cri.call("UpdatePodSandboxResources", pod_sandbox_id=pod.id, resources=limited_to(700 * mebibyte))
    assert host_limits(daemon, pod.id)[0] - first == 400 * mebibyte
    cri.remove_pod(pod)


def host_limits(daemon: Daemon, pod_id: str) -> tuple[int, int]:
    """Return the limits of memory and processes of a pod's cgroup in the daemon's own root, of v1 or v2."""
    places = [
        directory
        for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids")
        if (directory := Path(f"{root}{daemon.cgroup}/husk-{pod_id}")).is_dir()
    ]
    found = {
        path.name: int(path.read_text())
        for each in places
        for path in (*each.glob("memory.limit_in_bytes"), *each.glob("memory.max"), *each.glob("pids.max"))
    }
    return found.get("memory.max") or found["memory.limit_in_bytes"], found["pids.max"]


def test_stop_keeps_the_record_and_remove_deletes_it(cri: Cri) -> None:
    pod = cri.run_pod("ending")
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    ip = cri.pod_ip(pod)
    cri.stop_pod(pod)
    cri.stop_pod(pod)
    status = cri.pod_status(pod).status
    assert (status.state, status.network.ip) == (api.SANDBOX_NOTREADY, ip)
    ended = cri.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (api.CONTAINER_EXITED, 137, "Error")
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, ["true"])
    assert code_of(fault) == grpc.StatusCode.FAILED_PRECONDITION
    cri.remove_pod(pod)
    cri.remove_pod(pod)
    gone: dict[str, dict[str, Any]] = {
        "PodSandboxStatus": {"pod_sandbox_id": pod.id},
        "ContainerStatus": {"container_id": container},
    }
    for name, id in gone.items():
        with pytest.raises(grpc.RpcError) as fault:
            cri.call(name, **id)
        assert code_of(fault) == grpc.StatusCode.NOT_FOUND


def test_run_with_name_in_use_is_refused(cri: Cri, pod: Pod) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.call("RunPodSandbox", config=pod.config)
    assert code_of(fault) == grpc.StatusCode.FAILED_PRECONDITION


def test_unknown_handler_is_refused_by_name(cri: Cri) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        cri.run_pod("no-handler", handler="nonesuch")
    assert "nonesuch" in str(fault.value.details())


def test_dead_vm_is_not_ready(cri: Cri, daemon: Daemon) -> None:
    pod = cri.run_pod("doomed")
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    daemon.kill_vmm(pod.id)
    eventually_sync(
        lambda: cri.pod_status(pod).status.state,
        until=lambda state: state == api.SANDBOX_NOTREADY,
        timeout_s=10,
    )
    ended = cri.wait_exited(container, 10)
    assert ended.exit_code != 0
    cri.remove_pod(pod)


def test_processes_of_the_pod_run_confined(cri: Cri, pod: Pod, daemon: Daemon) -> None:
    for pid in daemon.vmm_pids(pod.id):
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split()[0] != "0", "QEMU must not run as root"
        assert status["Seccomp"].strip() == "2"
        cgroup = Path(f"/proc/{pid}/cgroup").read_text()
        assert f"husk-{pod.id}" in cgroup
