"""A virtiofsd that ends takes its pod with it: at once, with the reason, and nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.leaks import processes_naming
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SHARES = ("rootfs", "volumes")
NOTICED_S = 1.0
LOAD_S = 4.0  # what a busy machine may add


def helpers(daemon: Daemon, pod_id: str, share: str) -> list[int]:
    """Return the pids of a share's virtiofsd, the one that the daemon started first."""
    found = (each.split(" ", 2) for each in processes_naming(f"{daemon.run_directory}/pods/{pod_id}/"))
    return sorted(
        int(pid)
        for pid, program, rest in (each for each in found if len(each) == 3)
        if "virtiofsd" in program and f"/share/{share}" in rest
    )


def end(daemon: Daemon, pod_id: str, share: str, number: signal.Signals = signal.SIGKILL) -> None:
    pids = helpers(daemon, pod_id, share)
    assert pids, f"no virtiofsd serves {share}"
    # the last one is init of its PID namespace, which of unhandled signals only SIGKILL ends
    os.kill(pids[-1] if number is signal.SIGKILL else pids[0], number)


def await_not_ready(cri: Cri, pod: Pod, share: str) -> float:
    """Wait for the pod to be NotReady with the reason, and return how long that took, in seconds."""
    began = time.monotonic()
    eventually_sync(
        lambda: cri.pod_status(pod).status.state,
        until=lambda state: state == api.SANDBOX_NOTREADY,
        timeout_s=NOTICED_S + LOAD_S,
    )
    took_s = time.monotonic() - began
    assert f"virtiofsd for {share} ended" in str(cri.pod_status(pod, verbose=True).info["info"])
    return took_s


def assert_killed(cri: Cri, container: str, share: str) -> None:
    status = cri.wait_exited(container, timeout_s=NOTICED_S + LOAD_S)
    assert (status.exit_code, status.reason) == (137, "Error")
    assert f"virtiofsd for {share} ended" in status.message


def await_vmm_end(daemon: Daemon, pod: Pod) -> None:
    """Wait for the end of the VMM: containers that are reported as ended must not run on unseen."""
    eventually_sync(lambda: not daemon.vmm_pids(pod.id), timeout_s=NOTICED_S + LOAD_S)


@pytest.fixture
def ended(cri: Cri, daemon: Daemon, site: Site) -> Iterator[Pod]:
    """A pod whose virtiofsd the test ends; StopPodSandbox and RemovePodSandbox must work on it."""
    pod = cri.run_pod("ended")
    yield pod
    cri.stop_pod(pod)
    cri.remove_pod(pod)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_pod_whose_virtiofsd_ends_is_not_ready_with_the_reason(
    daemon: Daemon, cri: Cri, ended: Pod, share: str, number: signal.Signals
) -> None:
    running = cri.run(ended, BUSYBOX, ["sleep", "3600"])
    created = cri.create(ended, BUSYBOX, ["true"])
    end(daemon, ended.id, share, number)
    await_not_ready(cri, ended, share)
    assert_killed(cri, running, share)
    await_vmm_end(daemon, ended)
    for call in (
        lambda: cri.exec(running, "true"),
        lambda: cri.start(created),
        lambda: cri.create(ended, BUSYBOX, ["true"]),
    ):
        with pytest.raises(grpc.RpcError):
            call()
    cri.call("ListContainerStats")
    cri.call("ListPodSandboxStats")
    cri.remove(running)
    cri.remove(created)


def test_first_process_of_virtiofsd_that_is_killed_is_seen_and_nothing_is_left(
    daemon: Daemon, cri: Cri, ended: Pod
) -> None:
    """It forks: the child that serves must not outlive the parent, which the daemon knows."""
    os.kill(helpers(daemon, ended.id, "volumes")[0], signal.SIGKILL)
    await_not_ready(cri, ended, "volumes")
    cri.stop_pod(ended)  # at once, while the rest of the VM is being killed
    assert helpers(daemon, ended.id, "volumes") == []


def test_calls_in_flight_fail_with_the_end_of_virtiofsd(daemon: Daemon, cri: Cri, ended: Pod) -> None:
    container = cri.run(ended, BUSYBOX, ["sleep", "3600"])
    execs = [
        cri.begin("ExecSync", container_id=container, cmd=command)
        for command in (["sleep", "60"], ["sh", "-c", "while :; do cat /bin/busybox >/dev/null; done"])
    ]
    eventually_sync(lambda: "sleep 60" in cri.exec(container, "ps", "-o", "args").stdout, timeout_s=20)
    began = time.monotonic()
    end(daemon, ended.id, "rootfs")
    for call in execs:
        with pytest.raises(grpc.RpcError) as failed:
            call.result()
        assert "virtiofsd for rootfs ended" in str(failed.value.details())
    assert time.monotonic() - began < NOTICED_S + LOAD_S
    assert_killed(cri, container, "rootfs")


def test_virtiofsd_that_ends_while_containers_start_fails_the_starts(
    daemon: Daemon, cri: Cri, ended: Pod
) -> None:
    created = [cri.create(ended, BUSYBOX, ["sleep", "3600"]) for _ in range(4)]
    starts = [cri.begin("StartContainer", container_id=each) for each in created]
    end(daemon, ended.id, "rootfs")
    await_not_ready(cri, ended, "rootfs")
    for start, container in zip(starts, created, strict=True):
        if start.exception(timeout=NOTICED_S + LOAD_S) is None:
            assert_killed(cri, container, "rootfs")
        else:
            assert cri.status(container).state != api.CONTAINER_RUNNING


def test_virtiofsd_that_ends_while_the_daemon_is_away_is_seen_at_its_start(
    daemon: Daemon, cri: Cri, ended: Pod
) -> None:
    container = cri.run(ended, BUSYBOX, ["sleep", "3600"])
    daemon.kill()
    end(daemon, ended.id, "volumes")
    eventually_sync(lambda: not helpers(daemon, ended.id, "volumes"))
    daemon.start()
    await_not_ready(cri, ended, "volumes")
    assert_killed(cri, container, "volumes")
    await_vmm_end(daemon, ended)


def test_virtiofsd_that_ends_after_a_restart_of_the_daemon_is_seen(
    daemon: Daemon, cri: Cri, ended: Pod
) -> None:
    container = cri.run(ended, BUSYBOX, ["sleep", "3600"])
    daemon.kill()
    daemon.start()
    end(daemon, ended.id, "rootfs")
    await_not_ready(cri, ended, "rootfs")
    assert_killed(cri, container, "rootfs")


def test_frozen_virtiofsd_is_not_an_end(daemon: Daemon, cri: Cri, ended: Pod) -> None:
    container = cri.run(ended, BUSYBOX, ["sleep", "3600"])
    pids = helpers(daemon, ended.id, "volumes") + helpers(daemon, ended.id, "rootfs")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        reading = cri.begin("ExecSync", container_id=container, cmd=["ls", "/usr"])
        with pytest.raises(grpc.FutureTimeoutError):
            reading.result(timeout=NOTICED_S)
        assert cri.pod_status(ended).status.state == api.SANDBOX_READY
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert reading.result() is not None
    assert cri.status(container).state == api.CONTAINER_RUNNING
