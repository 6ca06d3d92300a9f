"""Directories of a root filesystem that are not in its overlay, so that overlays can be mounted on them.

overlayfs takes no directory of another overlayfs as its upper layer, as that cannot hold whiteouts. So such a
directory is one of the host's file system, with what the image has there, mounted over its place. Everything
blocks.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from image.idmap import IdMap
from sandbox.host import mount_flags, mounts
from sandbox.host.openat import make_beneath, open_beneath

COPY_TIMEOUT_S = 300.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def attach(root: Path, path: str, directory: Path, ids: IdMap | None) -> None:
    """Make `directory`, fill it with what the root has at `path`, and mount it there.

    Links are followed within the root. Where the image has something else than a directory, nothing is done.
    The mount ends with that of the root. It has no effect on the host: nosuid, nodev. Raises OSError.
    """
    make_beneath(root, path, directory=True)
    try:
        point = open_beneath(root, path, _DIRECTORY)
    except OSError:
        return
    try:
        directory.mkdir(parents=True)
        _fill(directory, point, ids)
        _mount(directory, point)
    finally:
        os.close(point)


def _fill(directory: Path, point: int, ids: IdMap | None) -> None:
    if os.listdir(point):
        _copy(point, directory)
        return
    status = os.fstat(point)
    owner = (status.st_uid, status.st_gid)
    if ids is not None and owner == (0, 0):
        owner = ids.root  # made just now: the host's root is not a user of the container
    os.chown(directory, *owner)
    directory.chmod(status.st_mode & 0o7777)


def _copy(point: int, directory: Path) -> None:
    """Copy everything, owners, links, devices and attributes included, as cp(1) does with --archive."""
    command = ["cp", "--archive", "--", f"/proc/self/fd/{point}/.", str(directory)]
    done = subprocess.run(
        command, pass_fds=(point,), capture_output=True, timeout=COPY_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise OSError(0, done.stderr.decode(errors="replace").strip()[-500:], str(directory))


def _mount(directory: Path, point: int) -> None:
    source = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        tree = mounts.clone_tree(source, directory)
    finally:
        os.close(source)
    try:
        mounts.set_tree_attributes(tree, directory, propagation=mount_flags.MS_PRIVATE, inert=True)
        mounts.attach_tree(tree, point, directory)
    finally:
        os.close(tree)
