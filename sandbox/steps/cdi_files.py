"""The node's CDI specifications, read from their directories.

They are read for each container that names a device, as drivers write them while the node runs. An invalid
file is named in the error for a device that is not found; devices of the other files can be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from sandbox.errors import InvalidSpec
from sandbox.plan import cdi
from sandbox.plan.cdi import ENDINGS, Found, Spec, SpecBroken
from sandbox.spec import ContainerSpec

FILE_MAX = 4 << 20


def find(directories: Sequence[Path]) -> Found:
    """Return the devices of all directories, and the invalid files; a later directory has precedence.

    A directory need not exist. Blocking.
    """
    parsed, problems = [], {}
    for directory in directories:
        specs: list[tuple[str, Spec]] = []
        for path in sorted(directory.glob("*")):
            if path.suffix in ENDINGS and path.is_file():
                try:
                    specs.append((str(path), _read(path)))
                except (SpecBroken, OSError) as error:
                    problems[str(path)] = str(error)
        parsed.append(specs)
    found = cdi.gather(parsed)
    return replace(found, problems=problems | found.problems)


def _read(path: Path) -> Spec:
    if path.stat().st_size > FILE_MAX:
        raise SpecBroken(f"is larger than {FILE_MAX >> 20} MiB")
    return cdi.parse(path.read_bytes(), path.name)


def with_devices(
    container: ContainerSpec, directories: Sequence[Path], *, in_vm: bool = True
) -> ContainerSpec:
    """Return the container with what its CDI devices add. Blocking.

    Raises InvalidSpec with the field, also for a mount whose source does not exist.
    """
    found = find(directories)
    whole = cdi.apply(container, found, in_vm=in_vm, disks=_disks(found))
    for mount in whole.mounts[len(container.mounts) :]:
        if not Path(mount.host_path).exists():
            names = ", ".join(request.name for request in container.cdi_devices)
            raise InvalidSpec(container.cdi_devices[0].field, f"{names}: {mount.host_path!r} does not exist")
    return whole


def _disks(found: Found) -> Iterator[str]:
    """Paths of block devices of this host that a CDI device has as a node."""
    for spec, device in found.devices.values():
        for edits in (spec.container_edits, device.container_edits):
            for node in edits.device_nodes:
                path = node.host_path or node.path
                if Path(path).is_block_device():
                    yield path
