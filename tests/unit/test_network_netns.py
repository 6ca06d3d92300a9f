"""Named namespaces are created, entered and removed, whatever state they are in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from network import netns
from network.errors import NetnsError
from tests.fakes.cni.space import Space, in_space


def inode(path: Path = netns.OWN) -> int:
    return path.stat().st_ino


@in_space
def test_namespace_is_created_entered_and_removed(space: Space) -> None:
    path, outside = space.netns_dir / "a", inode()
    netns.make(path)
    assert netns.is_namespace(path)
    inside, loopback = netns.run_in(path, lambda: (inode(), space.sh("ip -o link show up")))
    assert inside == inode(path) != outside == inode()
    assert "lo:" in loopback
    assert netns.run_in(path, lambda: Path("/proc/sys/net/ipv6/conf/default/accept_ra").read_text()) == "0\n"
    netns.remove(path)
    netns.remove(path)
    assert not path.exists() and str(path) not in Path("/proc/thread-self/mountinfo").read_text()


@in_space
def test_existing_name_is_refused(space: Space) -> None:
    path = space.netns_dir / "a"
    netns.make(path)
    with pytest.raises(NetnsError, match="File exists"):
        netns.make(path)
    assert netns.is_namespace(path)


@in_space
def test_half_created_namespace_is_removed(space: Space) -> None:
    path = space.netns_dir / "a"
    path.parent.mkdir()
    path.touch()
    assert not netns.is_namespace(path)
    with pytest.raises(NetnsError, match="enter"):
        netns.run_in(path, lambda: None)
    netns.remove(path)
    assert not path.exists()


@in_space
def test_failed_mount_leaves_nothing(space: Space) -> None:
    with pytest.raises(NetnsError, match="create"):
        netns.make(space.root / "conf" / ("x" * 300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(netns, "OWN", space.root / "nothing")
        with pytest.raises(NetnsError, match="mount: No such file"):
            netns.make(space.netns_dir / "a")
    assert not (space.netns_dir / "a").exists()


@in_space
def test_copy_in_another_mount_namespace_is_removed_too(space: Space) -> None:
    path = space.netns_dir / "a"
    netns.make(path)
    space.sh("ip link add up0 type veth peer name up1")
    space.sh(f"ip link set up1 netns {path}")
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 1000"],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    with holder.stdout:
        holder.stdout.readline()
        try:
            assert str(path) in Path(f"/proc/{holder.pid}/mountinfo").read_text()
            netns.remove(path)
            assert str(path) not in Path(f"/proc/{holder.pid}/mountinfo").read_text()
        finally:
            holder.kill()
            holder.wait()


@in_space
def test_failure_inside_is_raised_to_the_caller(space: Space) -> None:
    path = space.netns_dir / "a"
    netns.make(path)
    with pytest.raises(FileNotFoundError):
        netns.run_in(path, Path("/no/such/file").stat)
