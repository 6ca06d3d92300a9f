"""What a container's volumes cost does not grow with their number where it need not.

A process with a mount namespace takes the place of virtiofsd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from sandbox.host import mountinfo, mounts
from sandbox.spec import MountSpec
from sandbox.store import Store
from sandbox.vm_pods.volumes import find_sources
from tests.fakes.exporter import Site, exporting


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls that are too expensive to be made for each mount."""
    found: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        real: Callable[..., object] = getattr(owner, name)

        def counted(*arguments: object, **options: object) -> object:
            found[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(mountinfo, "parse")
    count(mounts, "in_namespace")
    count(Store, "put")
    return found


def many(site: Site, number: int) -> list[MountSpec]:
    """Directories of the host, every second one read-only."""
    found = []
    for index in range(number):
        (site.root / f"volume{index}").mkdir(exist_ok=True)
        path = str(site.root / f"volume{index}")
        found.append(MountSpec(container_path=f"/v{index}", host_path=path, readonly=index % 2 == 0))
    return found


@pytest.mark.parametrize("number", [1, 30])
async def test_new_volumes_of_any_number_need_each_table_once_and_one_record(
    calls: Counter[str], number: int
) -> None:
    async with exporting() as site:
        container = site.container(*many(site, number))
        calls.clear()
        await site.step.up(container)
        # the host's table and virtiofsd's
        assert calls == {"parse": 2, "in_namespace": 1, "put": 1}
        calls.clear()
        assert len(find_sources(container)) == number
        assert calls == {"parse": 1}  # what is mounted below the read-only ones
        await site.step.down(container)
        assert site.mounted() == []


async def test_volumes_that_are_exported_already_make_no_mount_points() -> None:
    async with exporting() as site:
        first = site.container(*many(site, 3))
        await site.step.up(first)
        back = site.pod.back_of(site.pod.volumes_share)
        before = {path.name: path.stat().st_ino for path in back.iterdir()}
        changed = back.stat().st_mtime_ns
        second = site.container(*many(site, 3), id="a" * 64)
        await site.step.up(second)
        assert {path.name: path.stat().st_ino for path in back.iterdir()} == before
        assert back.stat().st_mtime_ns == changed
        await site.step.down(first)
        assert site.mounted() == ["c0", "c1", "c2"]
        await site.step.down(second)
        assert site.mounted() == []
