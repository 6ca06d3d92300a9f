"""What can be set about images; `cri/config.py` fills it in."""

from __future__ import annotations

from pathlib import Path

import msgspec

from image.layer import Limits
from image.registry import Timing


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    config_path: Path | None = None  # of <host>/hosts.toml
    max_downloads: int = 4  # layers at a time, over all pulls
    max_unpacks: int = 2
    pull_timeout_s: float = 0.0  # 0: as long as bytes keep coming
    limits: Limits = Limits()
    timing: Timing = Timing()
