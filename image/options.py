"""The options of the image store, which `cri.daemon` fills in from the configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from image.budget import Limits
from image.registry import Timing
from image.trust import Policy


class ImageOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How images are pulled and unpacked."""

    config_path: Path | None = None  # directory of <host>/hosts.toml, see `image.hosts`
    max_downloads: int = 4  # layers at a time, over all pulls; a registry without any gets one more
    max_unpacks: int = 2  # layers at a time, over all pulls; a registry without any gets one more
    pull_timeout_s: float = 0.0  # of a whole pull; 0: unlimited, as long as bytes arrive
    min_free_bytes: int = 0  # that a pull leaves on its filesystem; 0: none
    auth_file: Path | None = None  # credentials of the node, see `image.node_credentials`
    trust: Mapping[str, Policy] = {}  # by prefix of image names
    pinned: tuple[str, ...] = ()  # patterns of full names of images that are not removed
    limits: Limits = Limits()
    timing: Timing = Timing()
