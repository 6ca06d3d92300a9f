"""The share of a pod for files whose size does not say what they hold: /proc, /sys and the like of the host.

The guest's kernel reads no further than a file's size, and the kernel's own files have none. It does so only
where it caches a file, so these trees are exported by a second virtiofsd, which allows no caching: each read
is one of the host's file. It costs some MiB, and is started with the first container of a pod that mounts
such a tree, and ends with the VM.

Crash story: the VM's handle names it once it serves; one that was added without that is found again when it
is needed again (`Growable.add_share`), and ends with the VM.
"""

from __future__ import annotations

import asyncio
import logging

from sandbox.errors import GuestError, VmmError, VmmGone
from sandbox.guest import guest_pb2 as pb
from sandbox.host import mountinfo, mounts
from sandbox.host.mountinfo import Tree
from sandbox.plan.shares import GUEST_UNCACHED, SHM_BYTES, UNCACHED_TAG
from sandbox.pod import Pod
from sandbox.steps.pod import make_share
from sandbox.vm_pods.link import link_of
from sandbox.vmm import ShareSpec

log = logging.getLogger(__name__)

MAX_PARTS = 16  # of one mount
# File systems of the kernel whose files are made when they are read (proc(5), sysfs(5), cgroups(7) ...).
KINDS = frozenset(
    (
        "proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "fusectl",
        "binfmt_misc", "bpf", "resctrl", "nfsd", "selinuxfs", "smackfs",
    )
)  # fmt: skip


def is_uncached(tree: Tree | None) -> bool:
    """Return whether the sizes of a tree's files do not say what they hold."""
    return tree is not None and tree.kind in KINDS


def uncached_below(tree: Tree) -> list[str]:
    """Return the outermost mounts beneath a tree that must not be cached, at most MAX_PARTS paths."""
    found: list[str] = []
    for path, line in sorted(tree.submounts.items()):
        if line.kind in KINDS and not any(mountinfo.relative(path, each) for each in found):
            found.append(path)
    return found[:MAX_PARTS]


async def open_share(pod: Pod) -> bool:
    """Share with the pod's guest what must not be cached, and return whether its VM can.

    Idempotent. To be called with `exports_lock` held. Raises VmmGone, GuestUnreachable, DeadlineExceeded,
    OSError.
    """
    machine = link_of(pod).machine
    if machine is None:
        raise VmmGone("the VM has ended")
    share = ShareSpec(tag=UNCACHED_TAG, source=str(pod.uncached_share), cache="none")
    await asyncio.to_thread(_make, pod)
    try:
        handle = await machine.add_share(share)
        pod.update_runtime(handle=handle)
        shares = [pb.Share(tag=UNCACHED_TAG, path=GUEST_UNCACHED)]
        await link_of(pod).call(pb.Request(prepare=pb.Prepare(shares=shares, shm_bytes=SHM_BYTES)))
    except VmmGone:
        raise
    except (VmmError, GuestError) as error:
        log.warning("pod %s: files of the host's kernel are empty in its containers: %s", pod.id, error)
        return False
    return True


def _make(pod: Pod) -> None:
    if not mounts.mounts_below(pod.uncached_share):
        pod.uncached_share.mkdir(mode=0o755, exist_ok=True)
        pod.uncached_share.rmdir()  # of an earlier attempt
        make_share(pod.back_of(pod.volumes_share), pod.uncached_share)
