"""Exports: what the agent mounts for all containers, and that no link leads a container out of one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from sandbox.host.mount_flags import MS_BIND, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REC
from tests.kit.agent import Agent, Guest, standard_mounts

DIRECTORY = pb.Mount.DIRECTORY


@pytest.fixture
def share(agent: Agent) -> Path:
    """Two exports, "whole" with a "part" in it that is also exported as "one"."""
    path = agent.directory / f"share{os.urandom(4).hex()}"
    for name in ("whole/part/deep", "one"):
        (path / name).mkdir(parents=True)
    (path / "whole/file").write_text("of the whole\n")
    (path / "whole/part/file").write_text("of the part\n")
    for name in ("whole", "one"):
        agent.run_inside("mount", "-t", "tmpfs", name, str(path / name))
    agent.run_inside("mkdir", str(path / "whole/part"))
    agent.run_inside("sh", "-c", f"echo older >{path}/one/file; echo whole >{path}/whole/file")
    return path


async def mount_exports(guest: Guest, *exports: pb.Export) -> None:
    await guest.client.call(pb.Request(mount_exports=pb.MountExports(exports=exports)), 10)


def part(share: Path, path: str = "part") -> pb.Export:
    parts = [pb.ExportPart(path=path, source=str(share / "one"))]
    return pb.Export(path=str(share / "whole"), parts=parts, submounts=["no/such"])


def bind(share: Path, path: str, flags: int = 0, **more: object) -> list[pb.Mount]:
    fields = {"source": str(share / path), "within": str(share / "whole"), "make": DIRECTORY, **more}
    mount = pb.Mount(target="/data", flags=MS_BIND | MS_REC | flags, **fields)  # type: ignore[arg-type]
    return [*standard_mounts(), mount]


async def test_part_is_mounted_over_its_place_for_all_containers(guest: Guest, share: Path) -> None:
    await mount_exports(guest, part(share))
    for source, name in (("whole", "/data/part/file"), ("whole/part", "/data/file")):
        assert await guest.sh(f"cat {name}", mounts=bind(share, source)) == (0, ["older"])


@pytest.mark.parametrize(("parts", "refused"), [(["part"], True), ([], False)])
async def test_part_has_the_flags_of_the_whole(
    guest: Guest, share: Path, parts: list[str], refused: bool
) -> None:
    await mount_exports(guest, part(share))
    mounts = bind(share, "whole", MS_RDONLY | MS_NOEXEC, parts=parts)
    code, lines = await guest.sh("echo x >/data/part/new", mounts=mounts)
    assert (code != 0, any("Read-only" in line for line in lines)) == (refused, refused)


async def test_part_that_is_not_there_is_a_failure(guest: Guest, share: Path) -> None:
    with pytest.raises(GuestError) as caught:
        await mount_exports(guest, part(share, "gone"))
    assert (caught.value.step, caught.value.errno) == ("export", errno.ENOENT)


async def test_part_is_not_mounted_where_a_link_leads(guest: Guest, share: Path) -> None:
    guest.agent.run_inside("ln", "-s", "/tmp", str(share / "whole/link"))
    with pytest.raises(GuestError) as caught:
        await mount_exports(guest, part(share, "link/x"))
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("path", ["whole/link", "whole/link/x", "whole/part/../link"])
async def test_source_within_an_export_follows_no_link(guest: Guest, share: Path, path: str) -> None:
    guest.agent.run_inside("ln", "-s", "/", str(share / "whole/link"))
    with pytest.raises(GuestError) as caught:
        await guest.sh("ls /data/", mounts=bind(share, path))
    assert (caught.value.step, caught.value.errno) == ("mount source", errno.ELOOP)


async def test_source_outside_of_what_it_is_said_to_be_within_is_refused(guest: Guest, share: Path) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.sh("true", mounts=bind(share, "one"))
    assert (caught.value.step, caught.value.errno) == ("mount source", errno.EINVAL)


async def test_exports_are_unmounted_but_for_those_that_are_kept(guest: Guest, share: Path) -> None:
    await mount_exports(guest, part(share))
    for names, left in ((["whole", "x"], ["whole", "whole/part"]), ([], []), ([], [])):
        await guest.client.call(pb.Request(keep_exports=pb.KeepExports(share=str(share), names=names)), 10)
        table = Path(f"/proc/{guest.agent.pid}/mounts").read_text()
        points = [line.split()[1] for line in table.splitlines()]
        assert sorted(point for point in points if str(share) in point) == [
            str(share / name) for name in left
        ]


async def test_target_bound_on_itself_stays_writable_under_a_read_only_root(guest: Guest) -> None:
    mount = pb.Mount(target="/kept/deep", flags=MS_BIND | MS_NOSUID, make=DIRECTORY)
    script = "echo x >/kept/deep/x && cat /kept/deep/x; echo x >/tmp/x; grep ' /kept/deep ' /proc/self/mounts"
    _, lines = await guest.sh(script, mounts=[*standard_mounts(), mount], readonly_rootfs=True)
    assert lines[0] == "x"
    assert "Read-only file system" in lines[1]
    assert "nosuid" in lines[2]
