"""An upgrade and the way back with running pods: earlier releases are built out of git's history.

docs/releases.md says what an upgrade keeps; tests/kit/releases.py has the releases.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon, Program
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.releases import freeze, release
from tests.kit.scratch import scratch_dir

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

BUSYBOX = f"{HOST}/husk/busybox:1"
PODS = int(os.environ.get("HUSK_TEST_UPGRADE_PODS", "10"))
# counts until its flag appears on a volume, or until it is stopped
SCRIPT = """\
trap 'echo stopped; exit 7' TERM
n=0
while [ ! -e /flags/$0 ]; do n=$((n + 1)); echo $n; sleep 0.5 & wait $!; done
echo over
exit 9"""


@dataclass
class Running:
    """A pod with a counting container."""

    cri: Cri
    flags: Path
    pod: Pod
    container: str
    boot: str = ""

    @property
    def name(self) -> str:
        return self.pod.config.metadata.name

    def count(self) -> int:
        """Return the last number in the log; none may be missing or doubled."""
        numbers = [line.text for line in self.cri.log(self.container) if line.text.isdigit()]
        assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
        return len(numbers)

    def read_boot(self) -> str:
        return self.cri.exec(self.container, "cat", "/proc/sys/kernel/random/boot_id").stdout

    def let_end(self) -> None:
        (self.flags / self.name).touch()

    def assert_ended(self, code: int, last: str) -> None:
        """Assert that the container has exited so, and that its log is whole."""
        assert self.cri.wait_exited(self.container).exit_code == code
        assert self.cri.log(self.container)[-1].text == last
        self.count()

    def assert_works(self) -> None:
        """Assert that neither VM nor container was restarted, and that everything can be asked of the pod."""
        cri = self.cri
        assert cri.pod_status(self.pod).status.state == api.SANDBOX_READY
        assert cri.status(self.container).state == api.CONTAINER_RUNNING
        assert self.read_boot() == self.boot
        stats = cri.call("ContainerStats", container_id=self.container).stats
        assert stats.cpu.usage_core_nano_seconds.value > 0 and stats.memory.usage_bytes.value > 0
        self.assert_counts_on()

    def assert_counts_on(self) -> None:
        seen = self.count()
        eventually_sync(self.count, until=lambda count: count > seen, timeout_s=30)


class Fleet:
    """Pods of one daemon, which changes its release under them."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.cri = daemon.cri
        self.flags = scratch_dir("flags")
        self.pods: list[Running] = []

    def run(self, name: str, *, in_vm: bool = True) -> Running:
        options = api.NamespaceOption(network=api.POD if in_vm else api.NODE)
        context = api.LinuxSandboxSecurityContext(namespace_options=options)
        linux = api.LinuxPodSandboxConfig(security_context=context, cgroup_parent=self.cri.cgroup_parent)
        pod = self.cri.run_pod(name, linux=linux, hostname=name if in_vm else "")
        volume = api.Mount(container_path="/flags", host_path=str(self.flags))
        container = self.cri.run(pod, BUSYBOX, ["sh", "-c", SCRIPT, name], name="main", mounts=[volume])
        running = Running(self.cri, self.flags, pod, container)
        running.boot = running.read_boot()
        self.pods.append(running)
        return running

    def change(self, program: Program, number: signal.Signals, *meanwhile: Running) -> None:
        """End the daemon and start another build; the containers of `meanwhile` end in between."""
        for each in meanwhile:  # it ends within 0.5 s and 1 s of caching
            each.let_end()
        (self.daemon.terminate if number == signal.SIGTERM else self.daemon.kill)()
        self.daemon.use(program)
        self.daemon.start(timeout_s=60)


@contextmanager
def fleet_of(site: Site, program: Program) -> Iterator[Fleet]:
    """Start the daemon of an earlier release; nothing may be left at the end."""
    daemon = Daemon(site.namespace, site.cni, site.mirrors, leases=site.leases)
    daemon.use(program)
    daemon.start(timeout_s=60)
    before = daemon.census()
    try:
        daemon.cri.pull(BUSYBOX)
        yield Fleet(daemon)
        daemon.remove_all()
        assert daemon.leaks_since(before) == []
    except BaseException:
        print(daemon.evidence())
        raise
    finally:
        daemon.close()


def test_upgrade_and_way_back_restart_no_pod_and_lose_nothing(site: Site) -> None:
    old, new = freeze(release("previous")), Program()
    with fleet_of(site, old) as fleet:
        cri = fleet.cri
        for number in range(PODS):
            fleet.run(f"pod-{number}")
        fleet.run("node-0", in_vm=False)
        fleet.run("node-1", in_vm=False)
        first, second, third, fourth, *_ = fleet.pods
        node_first, node_second = fleet.pods[PODS:]

        fleet.change(new, signal.SIGTERM, first, node_first)
        first.assert_ended(9, "over")
        node_first.assert_ended(9, "over")
        for each in [*fleet.pods[1:PODS], node_second]:
            each.assert_works()
        cri.stop(second.container)
        second.assert_ended(7, "stopped")
        assert cri.run_to_end(second.pod, BUSYBOX, ["sh", "-c", "echo more; exit 3"]) == (3, "more\n")
        cri.remove_pod(second.pod)
        made = fleet.run("made-by-the-new-one")
        assert cri.run_to_end(third.pod, BUSYBOX, ["true"])[0] == 0

        fleet.change(old, signal.SIGKILL, third)
        third.assert_ended(9, "over")
        for each in [*fleet.pods[3:PODS], node_second, made]:
            each.assert_works()
        cri.stop(made.container)
        made.assert_ended(7, "stopped")
        cri.stop(node_second.container)
        node_second.assert_ended(7, "stopped")
        assert cri.run_to_end(made.pod, BUSYBOX, ["sh", "-c", "exit 5"])[0] == 5

        fleet.change(new, signal.SIGKILL)
        for each in fleet.pods[3:PODS]:
            each.assert_works()
        cri.stop_pod(fourth.pod)
        fourth.assert_ended(137, str(fourth.count()))


def test_pods_with_an_agent_that_is_too_old_end_in_order(site: Site) -> None:
    """Protocol 1 was replaced as a whole; records of version 1 are migrated."""
    old, new = freeze(release("first")), Program()
    with fleet_of(site, old) as fleet:
        cri = fleet.cri
        ending, stopped, killed = (fleet.run(name) for name in ("ending", "stopped", "killed"))
        node = fleet.run("node", in_vm=False)

        fleet.change(new, signal.SIGTERM, ending)
        ending.assert_ended(9, "over")
        for each in (stopped, killed):
            assert cri.pod_status(each.pod).status.state == api.SANDBOX_NOTREADY
            assert cri.status(each.container).state == api.CONTAINER_RUNNING
            each.assert_counts_on()
            with pytest.raises(grpc.RpcError, match="FAILED_PRECONDITION"):
                cri.exec(each.container, "true")
        fleet.change(new, signal.SIGKILL)
        cri.stop(stopped.container)
        stopped.assert_ended(7, "stopped")
        cri.stop_pod(killed.pod)
        killed.assert_ended(137, str(killed.count()))
        node.assert_works()
        cri.stop(node.container)
        node.assert_ended(7, "stopped")
        assert fleet.run("new").read_boot() != stopped.boot
