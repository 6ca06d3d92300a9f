"""The files of the node that its pods may be given. Read for each container: an administrator edits them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sandbox.plan.pod_files import NodeFiles

HOSTS = Path("/etc/hosts")
RESOLV_CONF = Path("/etc/resolv.conf")


def read_node_files(hosts: Path = HOSTS, resolv_conf: Path = RESOLV_CONF) -> NodeFiles:
    """Return what is there now. A file need not exist. Blocking. Raises OSError."""
    return NodeFiles(
        nodename=os.uname().nodename, hosts=_content(hosts), resolv_conf=_content(resolv_conf) or b""
    )


def _content(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None
