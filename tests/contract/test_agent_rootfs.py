"""What the agent mounts in a container, and that no link leads it out of the container's root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from sandbox.host.mount_flags import MS_BIND, MS_NOEXEC, MS_PRIVATE, MS_RDONLY, MS_REC, MS_SHARED, MS_SLAVE
from tests.kit.agent import Agent, Guest, process, standard_devices, standard_mounts

DIRECTORY, FILE, LIKE_SOURCE = pb.Mount.DIRECTORY, pb.Mount.FILE, pb.Mount.LIKE_SOURCE


@pytest.fixture
def volume(agent: Agent) -> Path:
    path = agent.directory / f"volume{os.urandom(4).hex()}"
    path.mkdir()
    (path / "file").write_text("of the volume")
    return path


def bind(source: Path, target: str, flags: int = 0, **more: object) -> list[pb.Mount]:
    mount = pb.Mount(source=str(source), target=target, flags=MS_BIND | flags, **more)  # type: ignore[arg-type]
    return [*standard_mounts(), mount]


async def test_volume_is_mounted_writable(guest: Guest, volume: Path) -> None:
    mounts = bind(volume, "/data/deep", make=DIRECTORY)
    code, lines = await guest.sh("cat /data/deep/file; echo; echo new >/data/deep/new", mounts=mounts)
    assert (code, lines) == (0, ["of the volume"])
    assert (volume / "new").read_text() == "new\n"


async def test_readonly_volume_refuses_writes_and_exec(guest: Guest, volume: Path) -> None:
    mounts = bind(volume, "/data", MS_RDONLY | MS_NOEXEC, make=LIKE_SOURCE)
    (volume / "tool").write_text("#!/bin/sh\n")
    (volume / "tool").chmod(0o755)
    _, lines = await guest.sh("echo x >/data/new; /data/tool", mounts=mounts)
    assert "Read-only file system" in lines[0]
    assert "Permission denied" in lines[1]


async def test_single_file_is_mounted(guest: Guest, volume: Path) -> None:
    for make in (FILE, LIKE_SOURCE):
        mounts = bind(volume / "file", "/etc/deep/name", make=make)
        assert await guest.sh("cat /etc/deep/name", mounts=mounts) == (0, ["of the volume"])


async def test_mount_to_a_missing_target_that_is_not_made_fails(guest: Guest, volume: Path) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start(["true"], mounts=bind(volume, "/data"))
    assert (caught.value.step, caught.value.errno) == ("mount /data", 2)


@pytest.mark.parametrize("recursive", [False, True])
async def test_recursive_readonly_covers_mounts_beneath(guest: Guest, volume: Path, recursive: bool) -> None:
    """A plain read-only mount leaves what is mounted beneath it writable (CRI, Mount.readonly)."""
    (volume / "sub").mkdir()
    guest.agent.run_inside("mount", "-t", "tmpfs", "beneath", str(volume / "sub"))
    mounts = bind(volume, "/data", MS_REC | MS_RDONLY, make=DIRECTORY, recursive_readonly=recursive)
    script = "echo x >/data/new; echo x >/data/sub/new && echo written"
    _, lines = await guest.sh(script, mounts=mounts)
    assert "Read-only file system" in lines[0]
    assert (lines[1] == "written") is not recursive


async def test_submounts_are_opened_inside_the_source_only(guest: Guest, volume: Path) -> None:
    """A submount that is gone, a file or leads out is skipped; a source that is gone is a failure."""
    (volume / "out").symlink_to("/etc")
    mounts = bind(volume, "/data", MS_RDONLY, make=DIRECTORY, submounts=["gone/sub", "file", "out", "../.."])
    assert await guest.sh("cat /data/file", mounts=mounts) == (0, ["of the volume"])
    with pytest.raises(GuestError) as caught:
        await guest.start(["true"], mounts=bind(volume / "no", "/data", MS_RDONLY, submounts=["sub"]))
    assert (caught.value.step, caught.value.errno) == ("mount source", 2)


@pytest.mark.parametrize(("flags", "mark"), [(MS_SHARED, "shared:"), (MS_SLAVE, "master:"), (MS_PRIVATE, "")])
async def test_propagation_of_a_mount_is_set(guest: Guest, volume: Path, flags: int, mark: str) -> None:
    guest.agent.run_inside("mount", "--bind", str(volume), str(volume))
    guest.agent.run_inside("mount", "--make-shared", str(volume))
    mounts = bind(volume, "/data", MS_REC, make=DIRECTORY, propagation=flags | MS_REC)
    _, lines = await guest.sh("grep ' /data ' /proc/self/mountinfo", mounts=mounts)
    assert mark in lines[0]
    assert ("shared:" in lines[0], "master:" in lines[0]) == (flags == MS_SHARED, flags == MS_SLAVE)


async def test_later_mounts_reach_a_running_container(guest: Guest, volume: Path) -> None:
    guest.agent.run_inside("mount", "--bind", str(volume), str(volume))
    guest.agent.run_inside("mount", "--make-shared", str(volume))
    (volume / "sub").mkdir()
    mounts = bind(volume, "/data", MS_REC, make=DIRECTORY, propagation=MS_SLAVE | MS_REC)
    id = await guest.start(["sleep", "100"], mounts=mounts, rootfs_propagation=MS_SLAVE | MS_REC)
    guest.agent.run_inside("mount", "-t", "tmpfs", "later", str(volume / "sub"))
    guest.agent.run_inside("sh", "-c", f"echo came later >{volume}/sub/file")
    assert (await guest.exec(id, ["cat", "/data/sub/file"]))[1] == "came later\n"


async def test_readonly_root_covers_only_the_root_itself(guest: Guest) -> None:
    _, lines = await guest.sh("echo x >/file; echo x >/dev/new && echo fine", readonly_rootfs=True)
    assert "Read-only file system" in lines[0]
    assert lines[1] == "fine", "the root is read-only, /dev is not"


async def test_container_sees_no_mounts_of_the_guest(guest: Guest) -> None:
    _, lines = await guest.sh("cat /proc/self/mounts; ls /")
    assert not any("husk" in line and not line.startswith("/") for line in lines[:1])
    assert len([line for line in lines if line.count(" ") == 5]) == 4, "root, proc, dev, pts"
    assert "run" not in lines


async def test_devices_get_mode_owner_and_number(guest: Guest) -> None:
    device = pb.Device(path="/dev/sub/zero", type=0o020000, major=1, minor=5, mode=0o640, uid=3, gid=4)
    fifo = pb.Device(path="/dev/fifo", type=0o010000, mode=0o600)
    script = "stat -c '%a %u %g %t %T' /dev/sub/zero; head -c 3 /dev/sub/zero | wc -c; stat -c %F /dev/fifo"
    code, lines = await guest.sh(script, devices=[*standard_devices(), device, fifo])
    assert (code, lines) == (0, ["640 3 4 1 5", "3", "fifo"])


async def test_device_over_another_kind_of_file_fails(guest: Guest) -> None:
    device = pb.Device(path="/etc/secret", type=0o020000, major=1, minor=5, mode=0o666)
    with pytest.raises(GuestError) as caught:
        await guest.start(["true"], devices=[device])
    assert (caught.value.step, caught.value.errno) == ("device /etc/secret", 17)


async def test_symbolic_link_is_made(guest: Guest) -> None:
    link = pb.Link(path="/opt/here", target="../etc/secret")
    assert await guest.sh("cat /opt/here", links=[link]) == (0, ["of the image"])


async def test_files_are_bound_over_their_paths(guest: Guest) -> None:
    files = [
        pb.File(path="/etc/hosts", content=b"127.0.0.1 localhost\n", mode=0o644),
        pb.File(path="/etc/new/resolv.conf", content=b"nameserver ::1\n", mode=0o600, readonly=True),
    ]
    script = "cat /etc/hosts /etc/new/resolv.conf; echo more >>/etc/hosts; echo x >/etc/new/resolv.conf"
    id = await guest.start(["sh", "-c", "sleep 100"], files=files)
    code, out, err = await guest.exec(id, ["sh", "-c", script])
    assert (code, out) == (1, "127.0.0.1 localhost\nnameserver ::1\n")
    assert "Read-only file system" in err
    _, out, _ = await guest.exec(id, ["cat", "/etc/hosts"])
    assert out.endswith("more\n")


async def test_masked_and_readonly_paths_are_protected(guest: Guest) -> None:
    rootfs = guest.agent.rootfs()
    (rootfs / "etc/dir").mkdir()
    (rootfs / "etc/dir/file").write_text("hidden")
    (rootfs / "etc/link").symlink_to("/etc/secret")
    script = (
        "cat /etc/secret /etc/link; ls -A /etc/dir; echo x >/etc/dir/y; echo x >/etc/rw && echo wrote;"
        "echo x >/etc/frozen/y; echo 1 >/proc/sys/kernel/ns_last_pid"
    )
    (rootfs / "etc/frozen").mkdir()
    _, lines = await guest.sh(
        script,
        rootfs=rootfs,
        masked_paths=["/etc/secret", "/etc/dir", "/no/such", "/etc/secret/beneath"],
        readonly_paths=["/etc/frozen", "/proc/sys", "/no/such"],
    )
    assert len(lines) == 4
    assert [("Read-only" in line) for line in lines] == [True, False, True, True]
    assert lines[1] == "wrote"


async def test_cgroup_file_system_shows_only_the_container(guest: Guest) -> None:
    mount = pb.Mount(source="cgroup2", target="/cg", type="cgroup2", flags=MS_RDONLY, make=DIRECTORY)
    _, lines = await guest.sh("cat /cg/cgroup.procs; ls -d /cg/husk", mounts=[*standard_mounts(), mount])
    assert lines[0] == "1"
    assert "No such file" in lines[-1]


# ------------------------------------------------------------------------------- links out

OUTSIDE = "outside"


@pytest.fixture
def trap(agent: Agent) -> Path:
    """A directory next to the root that no container may reach."""
    path = agent.directory / OUTSIDE
    path.mkdir(exist_ok=True)
    return path


UP = "../" * 20


@pytest.mark.parametrize("form", ["absolute", "relative", "chained", "magic"])
@pytest.mark.parametrize("target", ["/link", "/link/deep/new", "/link/../escaped"])
async def test_mount_target_through_a_link_stays_inside_the_root(
    agent: Agent, guest: Guest, volume: Path, trap: Path, form: str, target: str
) -> None:
    rootfs = agent.rootfs()
    match form:
        case "absolute":
            (rootfs / "link").symlink_to(trap)
        case "relative":
            (rootfs / "link").symlink_to(f"{UP}{trap}")
        case "chained":
            (rootfs / "link").symlink_to("other")
            (rootfs / "other").symlink_to(f"/{UP}{trap}")
        case "magic":
            (rootfs / "link").symlink_to("/proc/self/cwd")
    before = sorted(trap.parent.iterdir())
    try:
        mounts = bind(volume, target, make=DIRECTORY)
        code, lines = await guest.sh(f"cat {target}/file", rootfs=rootfs, mounts=mounts)
    except GuestError as error:
        assert form == "magic"
        assert error.errno in (40, 1, 2, 13)
    else:
        assert (code, lines) == (0, ["of the volume"])
    assert list(trap.iterdir()) == []
    assert sorted(trap.parent.iterdir()) == before


@pytest.mark.parametrize(
    "more",
    [
        {"files": [pb.File(path="/link/file", content=b"x", mode=0o644)]},
        {"devices": [pb.Device(path="/link/null", type=0o020000, major=1, minor=3)]},
        {"links": [pb.Link(path="/link/link", target="x")]},
        {"process": process(["true"], cwd="/link/cwd", make_cwd=True)},
        {"masked_paths": ["/link"]},
        {"readonly_paths": ["/link"]},
    ],
)
async def test_other_paths_through_a_link_stay_inside_the_root(
    agent: Agent, guest: Guest, trap: Path, more: dict[str, object]
) -> None:
    rootfs = agent.rootfs()
    (rootfs / "link").symlink_to(f"{UP}{trap}")
    assert (await guest.run(["true"], rootfs=rootfs, **more))[0] == 0
    assert list(trap.iterdir()) == []
    (trap / "writable").write_text("still")
    (trap / "writable").unlink()


async def test_mount_target_in_a_loop_of_links_fails(agent: Agent, guest: Guest, volume: Path) -> None:
    rootfs = agent.rootfs()
    (rootfs / "a").symlink_to("b")
    (rootfs / "b").symlink_to("a")
    with pytest.raises(GuestError) as caught:
        await guest.start(["true"], rootfs=rootfs, mounts=bind(volume, "/a/x", make=DIRECTORY))
    assert caught.value.errno == 40


async def test_working_directory_outside_the_root_is_refused(guest: Guest) -> None:
    """Inherited descriptors of directories outside have been container escapes before."""
    for fd in range(20):
        wanted = process(["true"], cwd=f"/proc/self/fd/{fd}")
        with pytest.raises(GuestError) as caught:
            await guest.start(["true"], process=wanted)
        assert caught.value.step == "chdir"
