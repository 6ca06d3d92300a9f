"""Loop devices of the host on files of a test: the block devices that containers are given."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit.eventually import eventually_sync
from tests.kit.scratch import scratch_dir


@contextmanager
def loop_device(
    size: int = 16 << 20, begin: bytes = b"", *, readonly: bool = False, sector: int = 512
) -> Iterator[Path]:
    """Make a device whose content is a new sparse file with this beginning; both are gone afterwards."""
    file = scratch_dir("disk") / "content"
    with file.open("wb") as content:
        content.write(begin)
        content.truncate(size)
    options = [*(["--read-only"] if readonly else []), "--sector-size", str(sector)]
    command = ["losetup", "--find", "--show", *options, str(file)]
    device = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=False)
        eventually_sync(lambda: backing_file(device), until=lambda found: found != str(file), timeout_s=20)
        file.unlink()
        file.parent.rmdir()


def backing_file(device: Path) -> str:
    """Return the file that a loop device stands for; empty: it is free."""
    try:
        return Path(f"/sys/block/{device.name}/loop/backing_file").read_text().strip()
    except OSError:
        return ""


def content_of(device: Path) -> Path:
    """Return the file behind a device."""
    return Path(backing_file(device))


def is_free(device: Path) -> bool:
    """Return whether no process has the device exclusively."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))
    except OSError:
        return False
    return True


def loops_naming(mark: str) -> frozenset[str]:
    """Return the loop devices whose files have `mark` in their paths."""
    found = ((path, backing_file(path)) for path in Path("/sys/block").glob("loop*"))
    return frozenset(f"{path.name}: {file}" for path, file in found if mark in file)
