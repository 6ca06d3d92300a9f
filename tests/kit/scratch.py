"""One scratch directory for a whole test run, in which the kit creates everything else.

`HUSK_TEST_ROOT` names it if `tests/run` has created it. Left-over processes, mounts and cgroups are found by
its path, so two runs must not share it. Names are short because socket paths, which contain a pod's id of 64
digits, have at most 107 bytes (unix(7)).
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
    """Return the run's directory; without HUSK_TEST_ROOT it is created on first use."""
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
    """Create a directory in the root: `name` followed by the first free number."""
    for number in count():
        path = scratch_root() / f"{name}{number}"
        try:
            path.mkdir(mode=0o711)
        except FileExistsError:
            continue
        return path
    raise AssertionError("count() ended")
