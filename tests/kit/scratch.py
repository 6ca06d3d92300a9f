"""One scratch directory for a whole test run; all else that the kit makes lies beneath it.

`HUSK_TEST_ROOT` names it where `tests/run` made it already. Its path is the mark by which left-over
processes, mounts and cgroups are found, so it must not be shared by two runs. Names are short because
socket paths, which hold a pod's id of 64 digits, end at 107 bytes (unix(7)).
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
from itertools import count
from pathlib import Path

VARIABLE = "HUSK_TEST_ROOT"


def scratch_root() -> Path:
    """The run's directory; made on first use when nobody named one."""
    if VARIABLE not in os.environ:
        path = Path("/tmp") / f"hk-{secrets.token_hex(3)[:5]}"
        path.mkdir()
        atexit.register(shutil.rmtree, path, ignore_errors=True)
        os.environ[VARIABLE] = str(path)
    path = Path(os.environ[VARIABLE])
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o711)  # searchable by the unprivileged user that the VMM runs as
    return path


def scratch_dir(name: str = "") -> Path:
    """A fresh directory beneath the root: the name, if any, and the first number that is free."""
    for number in count():
        path = scratch_root() / f"{name}{number}"
        try:
            path.mkdir(mode=0o711)
        except FileExistsError:
            continue
        return path
    raise AssertionError("count() ended")
