"""The daemon goes, the pods stay: after SIGTERM and after kill -9 the next start takes them up."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
COUNTER = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done"
# waits for a word from outside, so that the test says when it ends
AWAITED = "until [ -e /go ]; do sleep 0.1; done; echo over; exit 7"

Ending = Callable[[Daemon], int]


def count_of(cri: Cri, container: str) -> int:
    """The last number logged; every line before it must be the one that belongs there."""
    texts = [line.text for line in cri.log(container)]
    assert texts == [str(number) for number in range(1, len(texts) + 1)]
    return len(texts)


@pytest.mark.parametrize(
    ("end", "status"),
    [(Daemon.terminate, 0), (Daemon.kill, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGKILL"],
)
def test_pods_outlive_the_daemon(daemon: Daemon, cri: Cri, site: Site, end: Ending, status: int) -> None:
    cri.pull(WEB)
    pod = cri.run_pod(f"survivor-{-status}")
    web = cri.run(pod, WEB, name="web")
    counter = cri.run(pod, BUSYBOX, ["sh", "-c", COUNTER], name="counter")
    eventually_sync(lambda: count_of(cri, counter), until=lambda count: count > 20, timeout_s=30)
    boot = cri.exec(counter, "cat", "/proc/sys/kernel/random/boot_id").stdout
    ip = cri.pod_ip(pod)
    began = cri.status(counter).started_at

    assert end(daemon) == status
    assert site.namespace.fetch(ip, 80) == "hello from the pod\n"
    daemon.start()

    assert [each.id for each in cri.call("ListPodSandbox").items] == [pod.id]
    assert {each.id for each in cri.call("ListContainers").containers} == {web, counter}
    assert cri.pod_status(pod).status.state == api.SANDBOX_READY
    assert cri.pod_ip(pod) == ip
    assert [cri.status(each).state for each in (web, counter)] == [api.CONTAINER_RUNNING] * 2
    assert cri.status(counter).started_at == began
    assert cri.exec(counter, "cat", "/proc/sys/kernel/random/boot_id").stdout == boot

    seen = count_of(cri, counter)
    eventually_sync(lambda: count_of(cri, counter), until=lambda count: count > seen + 20, timeout_s=30)
    third = cri.run(pod, BUSYBOX, ["sleep", "3600"], name="third")
    assert cri.exec(third, "true").code == 0
    cri.stop(counter, timeout=0)
    assert cri.status(counter).exit_code == 137
    count_of(cri, counter)
    cri.remove_pod(pod)


def leave_and_end_meanwhile(daemon: Daemon, cri: Cri, site: Site, pod: Pod) -> str:
    """Kill the daemon, then let the container end by its web server's word, then start again."""
    script = "mkdir -p /w/cgi-bin; printf '#!/bin/sh\\ntouch /go; echo; echo ok\\n' >/w/cgi-bin/go; "
    script += f"chmod +x /w/cgi-bin/go; httpd -p 80 -h /w; {AWAITED}"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script], name="awaited")
    ip = cri.pod_ip(pod)

    def listening() -> bool:
        try:
            site.namespace.dial(ip, 80).close()
        except OSError:
            return False
        return True

    eventually_sync(listening, timeout_s=20)
    daemon.kill()
    assert "ok" in site.namespace.fetch(ip, 80, "/cgi-bin/go")
    daemon.start()
    return container


def test_exit_code_is_kept_while_the_daemon_is_away(daemon: Daemon, cri: Cri, site: Site) -> None:
    pod = cri.run_pod("absent")
    container = leave_and_end_meanwhile(daemon, cri, site, pod)
    status = cri.wait_exited(container)
    assert (status.exit_code, status.reason) == (7, "Error")
    assert [line.text for line in cri.log(container)] == ["over"]
    cri.remove_pod(pod)


def test_vm_that_ended_while_daemon_was_down_is_not_ready(daemon: Daemon, cri: Cri) -> None:
    pod = cri.run_pod("died-meanwhile")
    container = cri.run(pod, BUSYBOX, ["sleep", "3600"])
    daemon.kill()
    daemon.kill_vmm(pod.id)
    daemon.start()
    eventually_sync(
        lambda: cri.pod_status(pod).status.state,
        until=lambda state: state == api.SANDBOX_NOTREADY,
        timeout_s=30,
    )
    assert cri.wait_exited(container).exit_code != 0
    cri.remove_pod(pod)


def test_stopped_pod_is_still_stopped_after_restart(daemon: Daemon, cri: Cri) -> None:
    pod = cri.run_pod("stopped")
    container = cri.run(pod, BUSYBOX, ["sh", "-c", "exit 3"])
    cri.wait_exited(container)
    ip = cri.pod_ip(pod)
    cri.stop_pod(pod)
    daemon.kill()
    daemon.start()
    status = cri.pod_status(pod).status
    assert (status.state, status.network.ip) == (api.SANDBOX_NOTREADY, ip)
    assert cri.status(container).exit_code == 3
    cri.remove_pod(pod)


def test_daemon_killed_during_run_pod_sandbox_leaves_nothing_after_restart(daemon: Daemon, cri: Cri) -> None:
    before = daemon.census()
    config = cri.pod_config("half-way")
    request = cri.begin("RunPodSandbox", config=config)
    # the VM runs and its network is up, and no client has the pod's id yet
    eventually_sync(
        lambda: daemon.census().processes,
        until=lambda seen: any("qemu" in each for each in seen),
        timeout_s=30,
    )
    daemon.kill()
    request.cancel()
    daemon.start()
    assert not cri.call("ListPodSandbox").items
    assert daemon.leaks_since(before, 20) == []


def test_pod_whose_record_is_of_a_newer_version_runs_on_until_it_is_removed(
    daemon: Daemon, cri: Cri, site: Site
) -> None:
    before = daemon.census()
    cri.pull(WEB)
    pod = cri.run_pod("from-the-future")
    web = cri.run(pod, WEB, name="web")
    ip, pids = cri.pod_ip(pod), daemon.vmm_pids(pod.id)
    daemon.kill()
    record = daemon.root / "pods" / f"{pod.id}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "version": 99}))
    daemon.start()
    assert daemon.vmm_pids(pod.id) == pids != []
    assert site.namespace.fetch(ip, 80) == "hello from the pod\n"
    [item] = cri.call("ListPodSandbox").items
    assert (item.id, item.state) == (pod.id, api.SANDBOX_NOTREADY)
    assert cri.status(web).state == api.CONTAINER_RUNNING
    assert f"pod {pod.id} is quarantined" in daemon.log_text()
    cri.stop_pod(pod)
    assert daemon.vmm_pids(pod.id) == []
    cri.remove_pod(pod)
    assert not record.exists()
    assert not cri.call("ListPodSandbox").items
    assert daemon.leaks_since(before, 20) == []
