"""Finding hypervisor drivers, and the `Hypervisor` that hands each VM to the driver that its spec names.

A driver is a package with two functions:

    make() -> Hypervisor           without effect on the host
    make_host(fs: Path) -> Host    `fs` is "/" except in tests

Ours are the folders beside this file. Others are entry points of the group `husk.hypervisors` (Python
packaging's `entry_points.txt`), whose value is the package: an installed distribution adds a driver
without any change here. A name that exists in both places means the folder.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol, cast

from sandbox import vmm
from sandbox.errors import InvalidSpec
from sandbox.vmm import Feature, Host, Hypervisor, Machine, VmHandle, VmSpec

log = logging.getLogger(__name__)

GROUP = "husk.hypervisors"


class Driver(Protocol):
    """The package of a driver."""

    def make(self) -> Hypervisor:
        """Return the driver. Must not start or examine anything yet."""

    def make_host(self, fs: Path) -> Host:
        """Return the driver's view of the machine whose root directory is `fs`."""


def find_hypervisors() -> list[str]:
    """Return the names of all drivers, ours first. Imports none of them."""
    return list(dict.fromkeys([*_folders(), *(point.name for point in _entry_points())]))


def find_hypervisor(name: str) -> Hypervisor:
    """Return a driver by its name. Raises InvalidSpec for one that cannot be loaded or is unknown, and
    names those that are known."""
    return _driver(name).make()


def find_host(name: str, fs: Path = Path("/")) -> Host:
    """Return the host side of a driver. Raises InvalidSpec as `find_hypervisor` does."""
    return _driver(name).make_host(fs)


def _folders() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(vmm.__path__) if module.ispkg]


def _entry_points() -> Collection[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=GROUP)


def _driver(name: str) -> Driver:
    if name in _folders():
        return cast(Driver, importlib.import_module(f"{vmm.__name__}.{name}"))
    for point in _entry_points():
        if point.name == name:
            return _load(point)
    raise InvalidSpec("hypervisor", f"{name!r} is unknown", ", ".join(find_hypervisors()))


def _load(point: importlib.metadata.EntryPoint) -> Driver:
    try:
        return cast(Driver, point.load())
    except Exception as error:  # whatever an installed package raises while it is imported
        raise InvalidSpec(
            "hypervisor", f"{point.name!r} ({point.value}) cannot be loaded: {error}"
        ) from error


class Hypervisors:
    """A Hypervisor over several drivers: VmSpec.hypervisor or VmHandle.hypervisor says which is meant."""

    def __init__(self, names: Iterable[str] | None = None) -> None:
        """Load the drivers `names`, or all that are found, so that `destroy` reaches also VMs of a driver
        that no handler is configured with any more.

        Raises InvalidSpec for one of `names`. Without it, a driver that cannot be loaded is logged.
        """
        self._drivers: dict[str, Hypervisor] = {}
        for name in find_hypervisors() if names is None else names:
            try:
                self._drivers[name] = find_hypervisor(name)
            except InvalidSpec as error:
                if names is not None:
                    raise
                log.error("%s", error)

    def features(self, spec: VmSpec) -> Collection[Feature]:
        """See Hypervisor."""
        return self._of(spec.hypervisor).features(spec)

    async def fingerprint(self, spec: VmSpec) -> str:
        """See Hypervisor."""
        return await self._of(spec.hypervisor).fingerprint(spec)

    async def start(self, spec: VmSpec, taps: tuple[int, ...]) -> Machine:
        """See Hypervisor."""
        return await self._of(spec.hypervisor).start(spec, taps)

    async def attach(self, handle: VmHandle) -> Machine:
        """See Hypervisor."""
        return await self._of(handle.hypervisor).attach(handle)

    async def destroy(self, pod_id: str, run_dir: Path) -> None:
        """Run the `destroy` of every driver, as only a record that may be lost knows which one it was."""
        ends = (driver.destroy(pod_id, run_dir) for driver in self._drivers.values())
        for result in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _of(self, name: str) -> Hypervisor:
        if name not in self._drivers:
            raise InvalidSpec("hypervisor", f"{name!r} is unknown", ", ".join(self._drivers))
        return self._drivers[name]
