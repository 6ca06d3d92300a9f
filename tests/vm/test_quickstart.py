"""deploy/quickstart from a shell, in a namespace where everything that it changes is in memory.

Its packages are installed already: `tests/run fresh` covers a new machine.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.leaks import CGROUPS, processes_naming
from tests.kit.namespace import Namespace
from tests.kit.scratch import scratch_root

pytestmark = pytest.mark.vm

TREE = Path(__file__).resolve().parents[2]
# users, networks, logs and state in memory, with the guest image of the tests
SET_UP = """set -e
mkdir /run/etc
mount -t tmpfs -o mode=755 husk-test-etc /run/etc
mkdir /run/etc/upper /run/etc/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work husk-test-etc /etc
mkdir -p /etc/cni /var/lib/husk
mount -t tmpfs -o mode=755 husk-test-cni /etc/cni
mount -t tmpfs -o mode=755 husk-test-log /var/log
mount -t tmpfs -o mode=711 husk-test-state /var/lib/husk
mkdir /var/lib/husk/guest
mount --bind "$1" /var/lib/husk/guest
"""


@pytest.fixture
def machine() -> Iterator[Namespace]:
    with Namespace(scratch_root()) as namespace:
        namespace.run("sh", "-c", SET_UP, "sh", os.environ["HUSK_TEST_GUEST"])
        yield namespace


def held(machine: Namespace) -> set[str]:
    """Return what a quickstart could leave behind: processes, cgroups, network links and files."""
    daemons = {each for each in processes_naming("-m cri serve") if each.rstrip().endswith(" serve")}
    groups = {str(root / "husk") for root in CGROUPS.iterdir() if (root / "husk").exists()}
    links = {line.split(": ")[1] for line in machine.run("ip", "-o", "link").splitlines()}
    files = set(machine.run("find", "/etc/cni", "/var/lib/cni", "-type", "f").split())
    # a process that has exited and was not waited for has no command line
    vms = {each for each in processes_naming("/husk/husk-") if each.partition(" ")[2]}
    return daemons | vms | groups | links | files


def start(machine: Namespace, *options: str) -> subprocess.Popen[str]:
    """Start it in a new process group, as a shell does, so that SIGINT reaches the whole group."""
    return subprocess.Popen(
        machine.command([f"{TREE}/deploy/quickstart", *options]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )


def test_quickstart_once_shows_a_pod_and_leaves_nothing(machine: Namespace) -> None:
    before = held(machine)
    program = start(machine, "--once")
    output, _ = program.communicate(timeout=240)
    assert program.returncode == 0, output
    kernels = {name: re.search(rf"{name} kernel: +(\S+)", output) for name in ("host", "guest")}
    assert kernels["host"] and kernels["guest"], output
    assert kernels["host"][1] == platform.release() != kernels["guest"][1]
    for shown in (
        r"accelerator: +(kvm|tcg) \(.+\)",
        r"Hello from a pod",
        r"\d+Z stderr F .*url:/",
        r"pod +\d+ ms",
    ):
        assert re.search(shown, output), (shown, output)
    assert held(machine) == before


def test_quickstart_after_sigint_stops_pod_and_daemon(machine: Namespace) -> None:
    before = held(machine)
    program = start(machine)
    assert program.stdout is not None
    output = ""
    end = time.monotonic() + 240
    while "Ctrl-C ends it" not in output:
        line = program.stdout.readline()
        assert line and time.monotonic() < end, output
        output += line
    running = held(machine) - before
    assert any("qemu-system" in each for each in running)
    os.killpg(program.pid, signal.SIGINT)
    rest, _ = program.communicate(timeout=60)
    assert program.returncode == 130, output + rest
    assert held(machine) == before, rest
