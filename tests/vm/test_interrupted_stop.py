"""The daemon is killed while containers are being stopped: their last line and exit code arrive."""

from __future__ import annotations

import random
import time

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
ROUNDS = 6
SEED = 10
TRAPS = "trap 'echo stopped; exit 7' TERM; echo started; while :; do sleep 0.1 & wait $!; done"


def await_line(cri: Cri, container: str, text: str) -> None:
    """Wait until a container has printed its first line."""
    eventually_sync(lambda: [line.text for line in cri.log(container)], until=[text].__eq__, timeout_s=30)


def test_containers_that_were_being_stopped_at_a_kill_keep_last_line_and_code(
    daemon: Daemon, cri: Cri, pod: Pod
) -> None:
    moments = random.Random(SEED)
    for number in range(ROUNDS):
        containers = [
            cri.run(pod, BUSYBOX, ["sh", "-c", TRAPS], name=f"c{number}-{each}") for each in range(3)
        ]
        for each in containers:
            await_line(cri, each, "started")  # the trap is set
        for each in containers:
            cri.begin("StopContainer", container_id=each, timeout=20)
        time.sleep(moments.uniform(0, 0.3))  # the moment of the kill is under test
        daemon.kill()
        daemon.start()
        for each in containers:
            cri.stop(each, timeout=20)
            status = cri.status(each)
            assert (status.state, status.exit_code) == (api.CONTAINER_EXITED, 7), f"round {number}"
            assert [line.text for line in cri.log(each)] == ["started", "stopped"], f"round {number}"
            cri.remove(each)


def test_start_that_a_kill_interrupted_is_retried_and_succeeds(daemon: Daemon, cri: Cri, pod: Pod) -> None:
    moments = random.Random(SEED)
    for number in range(ROUNDS):
        container = cri.create(pod, BUSYBOX, ["sh", "-c", "echo once; sleep 3600"], name=f"s{number}")
        cri.begin("StartContainer", container_id=container)
        time.sleep(moments.uniform(0, 0.15))  # likewise
        daemon.kill()
        daemon.start()
        cri.start(container)
        assert cri.status(container).state == api.CONTAINER_RUNNING
        await_line(cri, container, "once")
        cri.stop(container, timeout=0)
        assert [line.text for line in cri.log(container)] == ["once"], f"round {number}"
        cri.remove(container)
