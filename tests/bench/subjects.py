"""The runtimes that the bench measures, side by side in one namespace.

They share the host, the bridge, the registry and the client, and take turns, so that other load on the
machine affects all of them alike. `settle` keeps a runtime's background work (refilling a pool, deleting
images) out of the next one's figures.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sandbox.host.proc import read_stat
from tests.bench.containerd import Containerd
from tests.bench.figures import BASELINE
from tests.kit import cni
from tests.kit.cri import Cri
from tests.kit.daemon import Daemon
from tests.kit.leaks import processes_naming
from tests.kit.namespace import Namespace
from tests.kit.registry import HOST, Registry
from tests.kit.scratch import scratch_dir, scratch_root

IMAGE = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "86400")
QUIET_SHARE = 0.1  # of a core, over all processes of the run
QUIET_WINDOW_S = 0.2
QUIET_TIMEOUT_S = 20.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Runtime(Protocol):
    name: str
    cri: Cri

    @property
    def pid(self) -> int: ...

    def version(self) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Handler:
    """A source of VMs: `[handlers.NAME]` of Husk's configuration."""

    name: str
    settings: Mapping[str, object]


# The targets without a handler's name are for the first one.
HANDLERS: tuple[Handler, ...] = (
    Handler("pool", {"source": "pool"}),
    Handler("template", {"source": "template"}),
    Handler("boot", {"source": "boot"}),
)


@dataclass(frozen=True)
class Subject:
    """A runtime, and the handler with which pods are requested from it."""

    name: str
    runtime: Runtime
    handler: str = ""

    @property
    def cri(self) -> Cri:
        return self.runtime.cri


@dataclass(frozen=True)
class Site:
    """`subjects`: containerd, then Husk with each handler; either may be left out."""

    namespace: Namespace
    registry: Registry
    subjects: Sequence[Subject]
    mirrors: Path  # directories with a hosts.toml, for all runtimes

    @property
    def mains(self) -> Sequence[Subject]:
        """One subject of each runtime, for what does not depend on how VMs are made."""
        return [each for number, each in enumerate(self.subjects) if each.runtime not in self._before(number)]

    def _before(self, number: int) -> list[Runtime]:
        return [each.runtime for each in self.subjects[:number]]

    @property
    def husk(self) -> Daemon | None:
        return next((each.runtime for each in self.subjects if isinstance(each.runtime, Daemon)), None)

    def versions(self) -> dict[str, str]:
        return {each.runtime.name: each.runtime.version() for each in self.mains}


@contextmanager
def site(runtimes: Sequence[str], handlers: Sequence[Handler]) -> Iterator[Site]:
    """Both runtimes, running, with an empty registry. All is gone afterwards."""
    with contextlib.ExitStack() as held:
        namespace = held.enter_context(Namespace(scratch_root()))
        directory = scratch_dir("bench")
        registry = Registry(namespace)
        held.callback(registry.close)
        conf = cni.write_bridge(directory / "cni", directory / "leases")
        mirrors = registry.write_mirrors(directory / "mirrors")
        subjects: list[Subject] = []
        if BASELINE in runtimes:
            containerd = Containerd(namespace, conf, mirrors)
            held.callback(containerd.close)
            subjects.append(Subject(BASELINE, containerd))
        if "husk" in runtimes:
            settings = {f"handlers.{handler.name}": handler.settings for handler in handlers}
            daemon = Daemon(namespace, conf, mirrors, settings=settings)
            held.callback(daemon.close)
            daemon.start()
            subjects += [Subject(f"husk {handler.name}", daemon, handler.name) for handler in handlers]
        yield Site(namespace, registry, subjects, mirrors)


# --------------------------------------------------------------------------------- fairness


def settle() -> None:
    """Return when the processes of this run are idle, at the latest after QUIET_TIMEOUT_S."""
    end = time.monotonic() + QUIET_TIMEOUT_S
    before = cpu_seconds()
    while time.monotonic() < end:
        time.sleep(QUIET_WINDOW_S)
        now = cpu_seconds()
        if now - before <= QUIET_SHARE * QUIET_WINDOW_S:
            return
        before = now


def settle_disk() -> None:
    """Wait as `settle` does, then write everything to the disk."""
    settle()
    subprocess.run(["sync", "--file-system", str(scratch_root())], check=True)


def cpu_seconds() -> float:
    """Return the CPU time of all processes of this run."""
    total = 0
    for each in processes_naming(scratch_root().name):
        if stat := read_stat(int(each.split(" ", 1)[0])):
            total += stat.cpu_ticks
    return total / _TICKS_PER_S
