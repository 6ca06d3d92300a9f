"""Writes a volume of configuration as the kubelet does (Kubernetes, pkg/volume/util/atomic_writer.go)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path

_numbers = count(1)


def write_volume(volume: Path, payload: Mapping[str, str], *, mode: int = 0o644) -> None:
    """Replace the content of the volume: a new directory, `..data` renamed, links, then removals."""
    volume.mkdir(parents=True, exist_ok=True)
    data = volume / "..data"
    old = volume / data.readlink() if data.is_symlink() else None
    new = volume / f"..2026_01_01_00_00_00.{next(_numbers)}"
    new.mkdir(mode=0o755)
    for name, text in payload.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text(text)
        (new / name).chmod(mode)
    temporary = volume / "..data_tmp"
    temporary.symlink_to(new.name)
    temporary.rename(data)
    tops = {name.split("/")[0] for name in payload}
    for top in sorted(tops):
        if not (volume / top).is_symlink():
            (volume / top).symlink_to(f"..data/{top}")
    for link in volume.iterdir():
        if not link.name.startswith("..") and link.name not in tops:
            link.unlink()
    if old is not None:
        shutil.rmtree(old)
