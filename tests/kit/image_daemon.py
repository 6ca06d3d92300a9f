"""The daemon over fakes, with its real image store, as a process: what it takes in memory can be measured.

python -m tests.kit.image_daemon ROOT        prints "ready" when it serves ROOT/d/husk.sock
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from image.image_store import ImageStore
from image.options import ImageOptions
from image.registry import Timing
from tests.fakes.daemon import FakeHost

REPOSITORY = Path(__file__).resolve().parents[2]


async def _serve(root: Path) -> None:
    timing = Timing(attempts=2, backoff_s=0.01)
    images = ImageStore(root / "images", ImageOptions(timing=timing))
    images.load()
    daemon = FakeHost(root / "d").build(images)
    await daemon.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


class ImageDaemon:
    """A running daemon. `peak_mib` is the most memory that it had since `forget_peak`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "d" / "husk.sock"
        command = [sys.executable, "-m", "tests.kit.image_daemon", str(root)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def forget_peak(self) -> None:
        """Let the peak begin with what the daemon has now (proc(5), clear_refs)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """Return the largest resident set that the kernel saw."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the daemon has ended")

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()


@contextmanager
def image_daemon(root: Path) -> Iterator[ImageDaemon]:
    """Yield a daemon with its state below `root`."""
    daemon = ImageDaemon(root)
    try:
        yield daemon
    finally:
        daemon.kill()


if __name__ == "__main__":
    os.umask(0o022)
    asyncio.run(_serve(Path(sys.argv[1])))
