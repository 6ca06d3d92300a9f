"""The node's CDI specifications, as they lie in their directories at the moment.

They are read for each container that names a device: drivers write them while the node runs. A file that
is broken is told of where a name is not found, and keeps nobody from the other files' devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from sandbox.errors import InvalidSpec
from sandbox.plan import cdi
from sandbox.plan.cdi import ENDINGS, Found, Spec, SpecBroken
from sandbox.spec import ContainerSpec

FILE_MAX = 4 << 20


def find(directories: Sequence[Path]) -> Found:
    """All devices; of two directories the later one counts more. Absent directories are empty ones."""
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
    """The container with what its CDI devices bring. Blocking. Raises InvalidSpec."""
    whole = cdi.apply(container, find(directories), in_vm=in_vm)
    for mount in whole.mounts[len(container.mounts) :]:
        if not Path(mount.host_path).exists():
            names = ", ".join(wish.name for wish in container.cdi_devices)
            raise InvalidSpec(container.cdi_devices[0].field, f"{names}: {mount.host_path!r} does not exist")
    return whole
