"""The options of the image store, which `cri.daemon` fills in from the configuration file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from image.layer import Limits
from image.registry import Timing


class ImageOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How images are pulled and unpacked."""

    config_path: Path | None = None  # directory of <host>/hosts.toml, see `image.hosts`
    max_downloads: int = 4  # layers at a time, over all pulls; a registry without any gets one more
    max_unpacks: int = 2  # layers at a time, over all pulls
    pull_timeout_s: float = 0.0  # of a whole pull; 0: unlimited, as long as bytes arrive
    min_free_bytes: int = 0  # that a pull leaves on its filesystem; 0: none
    limits: Limits = Limits()
    timing: Timing = Timing()
