"""Tests that test_kvm.py runs in the outer VM, a host with KVM, vhost, AppArmor and only cgroup v2.

The image is imported, as a registry with many images would be slow under emulation.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.host import cgroup
from tests.kit import apparmor, cni, images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.namespace import Namespace
from tests.kit.scratch import scratch_dir, scratch_root

IMAGE = "example.test/husk/web:1"
PAGE = "a page from under KVM\n"
START_TIMEOUT_S = 120
CURRENT = "/proc/self/attr/apparmor/current"
EVIDENCE = Path("/nested/evidence")  # for the report of a test that failed


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """Start a daemon with one image, and check for leaks after the last test."""
    with Namespace(scratch_root()) as namespace:
        site = scratch_dir("site")
        leases = site / "leases"
        made = Daemon(namespace, cni.write_bridge(site / "cni", leases), site / "certs.d", leases=leases)
        made.start(START_TIMEOUT_S)
        before = made.census()
        try:
            archive = site / "web.tar"
            images.write_oci_layout(archive, {IMAGE: images.web(PAGE)})
            subprocess.run(made.command("image", "import", str(archive)), check=True, timeout=120)
            yield made
            made.remove_all()
            assert made.leaks_since(before, 20) == []
        finally:
            EVIDENCE.write_text(f"{made.evidence()}\n{memory()}")
            made.close()


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Pod:
    return daemon.cri.run_pod("nested")


@pytest.fixture(scope="module")
def web(daemon: Daemon, pod: Pod) -> str:
    return daemon.cri.run(pod, IMAGE)


def memory() -> str:
    """What this machine's kernel says about its memory, and killed for the lack of it."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout
    return f"--- memory\n{Path('/proc/meminfo').read_text()}\n{log[-4000:]}"


def info_of(cri: Cri) -> dict[str, Any]:
    answer = cri.call("Status", verbose=True).info
    return {key: json.loads(answer[key]) for key in ("accelerator", "acceleratorReason")}


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def files_of(pid: int) -> set[str]:
    return {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}


def test_accelerator_probe_finds_that_kvm_works(daemon: Daemon) -> None:
    info = info_of(daemon.cri)
    assert info["accelerator"] == "kvm", info
    assert "a guest booted under KVM" in info["acceleratorReason"]


def test_pod_runs_under_kvm(daemon: Daemon, pod: Pod, web: str) -> None:
    (vmm,) = daemon.vmm_pids(pod.id)
    arguments = arguments_of(vmm)
    assert arguments[arguments.index("-accel") + 1] == "kvm"
    assert any("kvm-vm" in each for each in files_of(vmm)), "QEMU has no descriptor of a KVM VM"
    assert "hypervisor" in daemon.cri.exec(web, "cat", "/proc/cpuinfo").stdout
    facts = json.loads(daemon.cri.pod_status(pod, verbose=True).info["info"])
    assert facts["accelerator"] == "kvm"
    assert facts["vmm"]["accelerator"] == "kvm"


def test_pod_web_server_answers_over_vhost_net(daemon: Daemon, pod: Pod, web: str) -> None:
    (vmm,) = daemon.vmm_pids(pod.id)
    assert "/dev/vhost-net" in files_of(vmm)
    assert any("vhost=on" in each for each in arguments_of(vmm))

    ip = daemon.cri.pod_ip(pod)
    fetched = eventually_sync(lambda: daemon.namespace.fetch(ip, 80), timeout_s=30, retry_on=(OSError,))
    assert fetched == PAGE
    assert has_vhost_worker(vmm)


def has_vhost_worker(vmm: int) -> bool:
    """Return whether vhost handles this VM's packets, in a kernel thread or (Linux 6.4) one of QEMU's."""
    threads = [*Path("/proc").glob("[0-9]*/comm"), *Path(f"/proc/{vmm}/task").glob("*/comm")]
    return any(each.read_text().strip() == f"vhost-{vmm}" for each in threads if each.exists())


def test_unprivileged_vmm_reaches_kvm(daemon: Daemon, pod: Pod) -> None:
    """/dev/kvm is accessible to root only, and stays so."""
    (vmm,) = daemon.vmm_pids(pod.id)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{vmm}/status").read_text().splitlines())
    assert "0" not in status["Uid"].split()
    assert int(status["CapEff"], 16) == 0
    assert Path("/dev/kvm").stat().st_mode & 0o077 == 0


def test_pod_on_cgroup_v2_has_vmm_and_virtiofsd_in_its_group(daemon: Daemon, pod: Pod, web: str) -> None:
    layout = cgroup.find_layout()
    assert (layout.mode, layout.hierarchies) == (cgroup.Mode.V2, ())
    (group,) = cgroup.directories(layout, cgroup.pod_path("", pod.id, root=daemon.cgroup))
    inside = {int(pid) for pid in Path(group, "cgroup.procs").read_text().split()}
    assert set(daemon.vmm_pids(pod.id)) <= inside
    programs = {Path(arguments_of(pid)[0]).name for pid in inside} - {
        ""
    }  # a kernel's thread has no arguments
    assert programs == {"qemu-system-x86_64", "virtiofsd"}


def test_vm_has_the_cpus_and_the_weight_of_its_containers_on_cgroup_v2(
    daemon: Daemon, pod: Pod, web: str
) -> None:
    (group,) = cgroup.directories(cgroup.find_layout(), cgroup.pod_path("", pod.id, root=daemon.cgroup))
    (vmm,) = daemon.vmm_pids(pod.id)
    resources = api.LinuxContainerResources(
        cpuset_cpus="0", cpuset_mems="0", cpu_shares=1024, oom_score_adj=100
    )

    def read(name: str) -> str:
        return Path(group, name).read_text().strip()

    linux = api.LinuxContainerConfig(resources=resources)
    container = daemon.cri.run(pod, IMAGE, ("sleep", "3600"), linux=linux)
    assert (read("cpuset.cpus"), read("cpuset.mems"), read("cpu.weight")) == ("0", "0", "39")
    threads = [each.read_text() for each in Path(f"/proc/{vmm}/task").glob("*/status")]
    assert threads and all("Cpus_allowed_list:\t0\n" in each for each in threads)
    assert Path(f"/proc/{vmm}/oom_score_adj").read_text() == "0\n", "beside a container with 0"
    with pytest.raises(grpc.RpcError) as caught:
        more = api.LinuxContainerResources(cpuset_cpus="0,99")
        daemon.cri.call("UpdateContainerResources", container_id=container, linux=more)
    assert "there is no 99 for the pod" in str(caught.value.details())
    assert read("cpuset.cpus") == "0"
    daemon.cri.remove(container)
    above = Path(group).parent.joinpath("cpuset.cpus.effective").read_text().strip()
    assert (read("cpuset.cpus"), read("cpu.weight")) == (above, "100")


def test_container_memory_limit_holds(daemon: Daemon, pod: Pod) -> None:
    eat = ["dd", "if=/dev/zero", "of=/dev/null", "bs=120M", "count=1"]
    limits = api.LinuxContainerConfig(resources=api.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    status = daemon.cri.wait_exited(daemon.cri.run(pod, IMAGE, eat, linux=limits))
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


@pytest.fixture
def node_pod(daemon: Daemon) -> Iterator[Pod]:
    """Run a pod with the node's network, which has no VM."""
    options = api.NamespaceOption(network=api.NODE)
    context = api.LinuxSandboxSecurityContext(namespace_options=options)
    made = daemon.cri.run_pod("node", linux=api.LinuxPodSandboxConfig(security_context=context))
    yield made
    daemon.cri.stop_pod(made)
    daemon.cri.remove_pod(made)
    assert not list(Path("/sys/fs/cgroup").rglob(f"*{made.id}"))


def test_host_pod_limits_hold_and_change(daemon: Daemon, node_pod: Pod) -> None:
    eat = ["dd", "if=/dev/zero", "of=/dev/null", "bs=120M", "count=1"]
    limits = api.LinuxContainerConfig(resources=api.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    status = daemon.cri.wait_exited(daemon.cri.run(node_pod, IMAGE, eat, linux=limits))
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    box = daemon.cri.run(node_pod, IMAGE, ["sleep", "1000"], linux=limits)
    (group,) = Path("/sys/fs/cgroup").rglob(box)
    assert (group / "memory.max").read_text() == f"{32 << 20}\n"
    changed = api.LinuxContainerResources(
        memory_limit_in_bytes=64 << 20, cpu_quota=50_000, cpu_period=100_000
    )
    daemon.cri.call("UpdateContainerResources", container_id=box, linux=changed)
    assert (group / "memory.max").read_text() == f"{64 << 20}\n"
    assert (group / "cpu.max").read_text() == "50000 100000\n"
    stats = daemon.cri.call("ContainerStats", container_id=box).stats
    assert stats.memory.usage_bytes.value > 0 and stats.cpu.usage_core_nano_seconds.value > 0
    assert daemon.cri.exec(box, "cat", "/proc/self/cgroup").stdout == "0::/\n"


def test_host_pod_devices_are_denied_by_bpf(daemon: Daemon, node_pod: Pod) -> None:
    box = daemon.cri.run(node_pod, IMAGE, ["sleep", "1000"])
    script = "mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem"
    assert "not permitted" in daemon.cri.exec(box, "sh", "-c", script).stderr
    assert daemon.cri.exec(box, "head", "-c", "1", "/dev/urandom").code == 0


PROFILE = "husk-test-tmp-denied"


@pytest.fixture(scope="module")
def loaded() -> Iterator[str]:
    """Load a profile into this machine's kernel, and unload it at the end."""
    directory = scratch_dir("apparmor")
    text = directory / "profile"
    text.write_text(apparmor.profile(PROFILE, "deny /tmp/** w"))
    command = [str(apparmor.parser()), "--config-file", "/dev/null", "--skip-cache"]
    subprocess.run([*command, "--replace", str(text)], check=True, timeout=60)
    yield PROFILE
    subprocess.run([*command, "--remove", str(text)], check=True, timeout=60)


def profiled(name: str = "") -> api.LinuxContainerConfig:
    kind = api.SecurityProfile.Localhost if name else api.SecurityProfile.RuntimeDefault
    profile = api.SecurityProfile(profile_type=kind, localhost_ref=name)
    rights = api.Capability(add_capabilities=["SYS_ADMIN"])
    security = api.LinuxContainerSecurityContext(apparmor=profile, capabilities=rights)
    return api.LinuxContainerConfig(security_context=security)


def test_apparmor_profile_of_the_host_is_enforced(daemon: Daemon, pod: Pod, loaded: str) -> None:
    box = daemon.cri.run(pod, IMAGE, ["sh", "-c", "echo x >/tmp/first; sleep 1000"], linux=profiled(loaded))
    assert daemon.cri.exec(box, "cat", CURRENT).stdout == f"{loaded} (enforce)\n"
    assert daemon.cri.exec(box, "ls", "/tmp").stdout == ""
    done = daemon.cri.exec(box, "sh", "-c", "echo x >/elsewhere && echo x >/tmp/new")
    assert done.code != 0
    assert "/tmp/new: Permission denied" in done.stderr
    assert daemon.cri.exec(box, "cat", "/elsewhere").stdout == "x\n"


def test_apparmor_profile_that_is_not_loaded_is_refused(daemon: Daemon, pod: Pod, loaded: str) -> None:
    with pytest.raises(grpc.RpcError) as fault:
        daemon.cri.create(pod, IMAGE, ["true"], linux=profiled(f"{loaded}-not"))
    assert "apparmor.localhost_ref" in str(fault.value.details())
    assert "not loaded in this host's kernel" in str(fault.value.details())


def test_apparmor_default_profile_denies_mounts(daemon: Daemon, pod: Pod) -> None:
    box = daemon.cri.run(pod, IMAGE, ["sleep", "1000"], linux=profiled())
    assert daemon.cri.exec(box, "cat", CURRENT).stdout == "husk-default (enforce)\n"
    done = daemon.cri.exec(box, "mount", "-t", "tmpfs", "none", "/tmp")
    assert done.code != 0
    assert "Permission denied" in done.stderr
    assert daemon.cri.exec(box, "sh", "-c", "echo h >/proc/sysrq-trigger").code != 0


def test_next_daemon_recovers_the_pod(daemon: Daemon, pod: Pod, web: str) -> None:
    vmm = daemon.vmm_pids(pod.id)
    daemon.kill()
    daemon.start(START_TIMEOUT_S)
    assert daemon.vmm_pids(pod.id) == vmm
    assert daemon.cri.exec(web, "true").code == 0
    assert info_of(daemon.cri)["accelerator"] == "kvm"  # remembered, not probed again


def test_stopped_pod_leaves_no_cgroup(daemon: Daemon, pod: Pod) -> None:
    daemon.cri.stop_pod(pod)
    daemon.cri.remove_pod(pod)
    assert not list(Path("/sys/fs/cgroup").rglob(f"*{pod.id}"))
    assert not Path("/sys/fs/cgroup" + daemon.cgroup).exists()
