"""Other users of the host reach nothing of a pod: containers' root filesystems lie in its directory."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.test_pod_faults import Daemon, container_spec, pod_spec, root

__all__ = ["root"]  # a fixture

NOBODY = 65534


@pytest.fixture
async def daemon(root: Path) -> AsyncIterator[Daemon]:
    root.chmod(0o711)  # what is above is the administrator's
    daemon = Daemon(root)
    yield daemon
    for pod in list(daemon.inventory.pods.values()):
        await daemon.pods.remove(pod.id)
    await daemon.kill()


def opens(path: Path) -> bool:
    """Whether an unprivileged user of the host can list a directory."""
    done = subprocess.run(["ls", str(path)], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True)
    return done.returncode == 0


async def test_files_of_a_pod_are_closed_to_other_users(daemon: Daemon) -> None:
    id = await daemon.pods.run(pod_spec())
    await daemon.containers.create(id, container_spec())
    pods = daemon.root / "run" / "pods"
    assert [path.stat().st_mode & 0o777 for path in (pods, pods / id)] == [0o700, 0o700]
    for path in (pods, pods / id, pods / id / "share" / "rootfs", pods / id / "back" / "volumes"):
        assert path.is_dir() and not opens(path)


async def test_directory_that_an_earlier_release_left_open_is_closed_by_the_next_start(
    daemon: Daemon,
) -> None:
    await daemon.pods.run(pod_spec())
    pods = daemon.root / "run" / "pods"
    pods.chmod(0o755)
    assert opens(pods), "as it was"
    await daemon.restart()
    assert not opens(pods)
