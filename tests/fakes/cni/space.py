"""A network and mount namespace for one test, and a census of what is in it.

The test body runs in a thread that created both namespaces for itself: the threads and processes that it
starts are in them too, and they end with the thread. The rest of the process stays outside.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import uvloop

from network.attach import Networks
from network.spec import NetworkRequest
from sandbox.host import mount_flags, syscalls

PLUGINS = Path("/usr/lib/cni")
FAKE = Path(__file__).with_name("plugin.py")


class Space:
    """The directories of a `Networks`, and short ways to inspect the namespace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf_dir, self.bin_dir = root / "conf", root / "bin"
        self.cache_dir, self.netns_dir = root / "cache", root / "netns"
        self.log = root / "calls"
        for directory in (self.conf_dir, self.bin_dir):
            directory.mkdir()

    def networks(self, timeout_s: float = 20) -> Networks:
        return Networks(
            conf_dir=self.conf_dir,
            bin_dirs=(self.bin_dir, PLUGINS),
            cache_dir=self.cache_dir,
            netns_dir=self.netns_dir,
            plugin_timeout_s=timeout_s,
        )

    def add_fake(self, name: str) -> None:
        write_fake(self.bin_dir, name)

    def configure(self, *plugins: Mapping[str, Any], version: str = "1.0.0", **fields: Any) -> Path:
        path = self.conf_dir / "10-test.conflist"
        path.write_text(json.dumps({"cniVersion": version, "name": "test", "plugins": plugins, **fields}))
        return path

    def calls(self) -> list[dict[str, Any]]:
        """Each call of a fake that logs: verb, plugin, variables, conf."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def sh(self, command: str, *, check: bool = True, timeout_s: float = 20) -> str:
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=timeout_s)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def census(self) -> dict[str, frozenset[str]]:
        """Everything that an attachment could leave behind. Bridges belong to the network and stay."""
        links = (line.split(": ")[1].split("@")[0] for line in self.sh("ip -o link").splitlines())
        rules = self.sh("iptables-save; ip6tables-save").splitlines()
        mounts = Path("/proc/thread-self/mountinfo").read_text().splitlines()
        leases = Path("/var/lib/cni").rglob("*")
        return {
            "links": frozenset(links) - {"cni0", "husk0", "lo", "up0", "up1"},
            "rules": frozenset(r for r in rules if r.startswith("-A") and "pod-" in r),
            "mounts": frozenset(m.split()[4] for m in mounts if str(self.root) in m),
            "leases": frozenset(
                p.name for p in leases if p.is_file() and "_" not in p.name and p.name != "lock"
            ),
            "namespaces": _names(self.netns_dir),
            "cache": _names(self.cache_dir),
        }

    def settled(self, deadline_s: float = 5.0) -> dict[str, frozenset[str]]:
        """Return the census once no link is left: the kernel removes the veths of an ended namespace a little
        later.
        """
        end = time.monotonic() + deadline_s
        while (seen := self.census())["links"] and time.monotonic() < end:
            time.sleep(0.05)
        return seen


def write_fake(directory: Path, name: str) -> None:
    """Create a plug-in program `name` that does as its configuration says; it writes its pid to `pid`."""
    path = directory / name
    path.write_text(f"#!/bin/sh\necho $$ >{directory}/pid\nexec {sys.executable} -SE {FAKE} {name}\n")
    path.chmod(0o755)


def _names(directory: Path) -> frozenset[str]:
    return frozenset(path.name for path in directory.iterdir()) if directory.is_dir() else frozenset()


CLEAN: dict[str, frozenset[str]] = {
    name: frozenset() for name in ("links", "rules", "mounts", "leases", "namespaces", "cache")
}


def make_request(pod_id: str = "pod-1", **fields: Any) -> NetworkRequest:
    return NetworkRequest(pod_id=pod_id, name="web", namespace="default", uid="u-1", **fields)


def bridge(**fields: Any) -> dict[str, Any]:
    """Debian's bridge plug-in with addresses of both families."""
    return {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,  # as that takes a dozen runs of iptables
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
        **fields,
    }


PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}


def in_space(body: Callable[..., Coroutine[Any, Any, None] | None]) -> Callable[..., None]:
    """Make a test of a function, plain or async, whose first argument is the Space."""

    def test(tmp_path: Path, **arguments: Any) -> None:
        fault: list[BaseException] = []

        def work() -> None:
            try:
                enter_new_namespaces()
                outcome = body(Space(tmp_path), **arguments)
                if outcome is not None:
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        runner.run(outcome)
            except BaseException as caught:  # the thread's edge
                fault.append(caught)

        thread = threading.Thread(target=work, name="test-space")
        thread.start()
        thread.join()
        if fault:
            raise fault[0]

    signature = inspect.signature(body)
    own = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = list(signature.parameters.values())[1:]
    test.__signature__ = signature.replace(parameters=[own, *others], return_annotation=None)  # type: ignore[attr-defined]
    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    return test


def enter_new_namespaces() -> None:
    """Move the calling thread into a new network and a new mount namespace. Needs root."""
    syscalls.unshare(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", flags=mount_flags.MS_REC | mount_flags.MS_PRIVATE)
    script = """set -e
    mount -t tmpfs husk-test /run
    mkdir -p /var/lib/cni
    mount -t tmpfs husk-test /var/lib/cni
    ip link set lo up
    # a new bridge or veth of the host would answer IPv6 only after a probe for its own addresses
    echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
    echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad"""
    subprocess.run(["sh", "-c", script], check=True)
