"""Files that a container and the kubelet both write: when the agent is asked to read one again."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from sandbox.container import Container
from sandbox.errors import GuestError, GuestUnreachable
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.host.tasks import Tasks
from sandbox.spec import MountSpec
from sandbox.vm_pods.link import link_of
from sandbox.vm_pods.received_mounts import ReceivedMounts
from sandbox.vm_pods.shared_files import READ_BYTES, HostChanges, SharedFiles
from tests.fakes.exporter import Site, exporting
from tests.kit.eventually import eventually


class Agent:
    """Keeps the paths that it was asked to read again."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fault: Exception | None = None

    async def call(self, request: pb.Request, timeout_s: float) -> pb.Reply:
        if request.WhichOneof("body") == "refresh_file":
            if self.fault is not None:
                raise self.fault
            self.asked.append(request.refresh_file.path)
        return pb.Reply()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with exporting() as made:
        link_of(made.pod).client = cast(GuestClient, Agent())
        yield made


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    tasks = Tasks()
    yield tasks
    await tasks.close()


def agent(site: Site) -> Agent:
    return cast(Agent, link_of(site.pod).client)


def file_of(site: Site, name: str = "pods/uid/etc-hosts") -> Path:
    path = site.root / name
    path.parent.mkdir(parents=True)
    path.write_text("old\n")
    return path


def step_of(site: Site, tasks: Tasks) -> HostChanges:
    return HostChanges(ReceivedMounts(tasks, site.inventory), SharedFiles(tasks, site.inventory))


async def up(site: Site, step: HostChanges, path: Path, **fields: Any) -> Container:
    container = site.container(MountSpec(container_path="/x", host_path=str(path), **fields))
    await site.step.up(container)
    await step.up(container)
    return container


async def await_asked(site: Site, count: int) -> None:
    await eventually(lambda: len(agent(site).asked), until=lambda asked: asked == count)


@pytest.mark.parametrize("name", ["pods/uid/etc-hosts", "pods/uid/containers/main/0a1b"])
async def test_change_of_the_host_is_reported_once(site: Site, tasks: Tasks, name: str) -> None:
    step, path = step_of(site, tasks), file_of(site, name)
    container = await up(site, step, path)
    path.write_text("new\n")
    await await_asked(site, 1)
    assert agent(site).asked == [f"/run/husk/volumes/{container.record.volumes[0].export}"]
    path.touch()  # as the agent's own doing
    path.write_text("newer\n")
    await await_asked(site, 2)
    await site.step.down(container)


async def test_file_without_a_match_or_read_only_is_not_watched(site: Site, tasks: Tasks) -> None:
    step, path = step_of(site, tasks), file_of(site)
    frozen = await up(site, step, path, readonly=True)
    path.write_text("new\n")
    other = site.root / "other"
    other.write_text("old\n")
    assert await up(site, step, other) and frozen
    other.write_text("new\n")
    await step.shared.recover(site.pod)
    assert agent(site).asked == []


@pytest.mark.parametrize("fault", [GuestError("refresh", errno.EOPNOTSUPP, ""), GuestUnreachable("gone")])
async def test_report_that_fails_is_made_with_the_next_change(
    site: Site, tasks: Tasks, fault: Exception
) -> None:
    step, path = step_of(site, tasks), file_of(site)
    await up(site, step, path)
    agent(site).fault = fault
    path.write_text("new\n")
    await eventually(lambda: all(file.seen == file.changes > 0 for file in step.shared.files))
    agent(site).fault = None
    path.write_text("newer\n")
    await await_asked(site, 1)


async def test_next_daemon_reports_each_file_once(site: Site, tasks: Tasks) -> None:
    path, earlier = file_of(site), Tasks()
    await up(site, step_of(site, earlier), path)
    await earlier.close()
    path.write_text("meanwhile\n")
    site.restart()
    later = step_of(site, tasks)
    await later.shared.recover(site.pod)
    await await_asked(site, 1)
    path.write_text("afterwards\n")
    await await_asked(site, 2)


async def test_file_that_vanishes_or_grows_long_is_no_failure(site: Site, tasks: Tasks) -> None:
    step, path = step_of(site, tasks), file_of(site)
    container = await up(site, step, path)
    path.write_bytes(b"x" * (READ_BYTES + 1))
    await await_asked(site, 1)
    with path.open("ab") as file:
        file.write(b"x")
    await await_asked(site, 2)
    path.unlink()
    await step.down(container)
    await step.down(container)
    assert not step.shared.files
