"""The modules that a guest loads on demand, in its share of root filesystems: read-only, undone with it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from sandbox.host import mounts
from sandbox.pod import Pod
from sandbox.steps.pod import Shares


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    """Return what the step needs of a pod."""
    share = tmp_path / "run/share"
    yield cast(
        Pod,
        SimpleNamespace(
            run_dir=tmp_path / "run",
            rootfs_share=share / "rootfs",
            volumes_share=share / "volumes",
            back_of=lambda share: tmp_path / "run/back" / share.name,
        ),
    )
    mounts.unmount_tree(tmp_path / "run")


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    directory = tmp_path / "guest/hash/modules"
    directory.mkdir(parents=True)
    (directory / "aliases").write_text("bridge kernel/bridge.ko\n")
    return directory


async def test_modules_are_mounted_read_only_in_the_share(pod: Pod, modules: Path) -> None:
    step = Shares(lambda _: modules)
    await step.up(pod)
    seen = pod.rootfs_share / "modules"
    assert (seen / "aliases").read_text() == "bridge kernel/bridge.ko\n"
    with pytest.raises(OSError) as fault:
        (seen / "aliases").write_text("")
    assert fault.value.errno == errno.EROFS
    for _ in range(2):
        await step.down(pod)
        assert mounts.mounts_below(pod.run_dir) == []
    assert (modules / "aliases").exists()


async def test_modules_that_are_gone_fail_the_step_which_is_undone(pod: Pod, modules: Path) -> None:
    step = Shares(lambda _: modules / "gone")
    with pytest.raises(OSError):
        await step.up(pod)
    await Shares().down(pod)  # as after a crash: nothing is known but the pod
    assert mounts.mounts_below(pod.run_dir) == []


async def test_kernel_without_modules_shares_none(pod: Pod) -> None:
    await Shares().up(pod)
    assert list(pod.rootfs_share.iterdir()) == []
    await Shares().down(pod)
