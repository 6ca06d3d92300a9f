"""Limits on what images, archives and registries may send, and the budgets that parsers spend against them.

Each limit is one field of `Limits`; its name is the key in `[registry.limits]` of the configuration file, and
every rejection names that key, the limit and the value. Who parses for an entry or a document adds its name.
"""

from __future__ import annotations

import threading
import time
from typing import Annotated

import msgspec

TABLE = "registry.limits"

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
_Bytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
_Small = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]  # what is held in memory at once
_Seconds = Annotated[int, msgspec.Meta(ge=1, le=604800)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[registry.limits]`. docs/configuration.md says what each one bounds."""

    # one layer's archive
    layer_bytes: _Bytes = 128 << 30
    layer_entries: _Count = 2_000_000
    layer_depth: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 256
    layer_segments: _Count = 1 << 20
    layer_tail_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 64 << 20
    unpack_s: _Seconds = 3600
    # headers of any tar archive
    extension_bytes: _Small = 1 << 20
    extensions_bytes: _Small = 2 << 20
    global_bytes: _Small = 4 << 20
    pax_records: _Count = 10_000
    # decompression
    window_bytes: _Small = 32 << 20
    # manifests, indexes and configurations
    manifest_bytes: _Small = 4 << 20
    config_bytes: _Small = 4 << 20
    json_values: _Count = 100_000
    json_depth: Annotated[int, msgspec.Meta(ge=4, le=200)] = 64
    manifests: _Count = 64
    index_depth: Annotated[int, msgspec.Meta(ge=1, le=16)] = 3
    layers: Annotated[int, msgspec.Meta(ge=1, le=500)] = 500  # overlayfs stacks no more (OVL_MAX_STACK)
    run_bytes: _Small = 256 << 10
    user_characters: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1024
    # what a registry or token service answers
    headers: Annotated[int, msgspec.Meta(ge=16, le=10_000)] = 256
    header_bytes: Annotated[int, msgspec.Meta(ge=1024, le=100 << 10)] = 64 << 10
    challenges: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 32
    challenge_bytes: Annotated[int, msgspec.Meta(ge=256, le=100 << 10)] = 16 << 10
    token_answer_bytes: _Small = 1 << 20
    token_bytes: Annotated[int, msgspec.Meta(ge=256, le=1 << 20)] = 64 << 10
    signature_bytes: _Small = 1 << 20
    # hosts.toml
    hosts_bytes: _Small = 1 << 20
    hosts: _Count = 64
    # an archive that is imported
    archive_bytes: _Bytes = 1 << 40
    archive_entries: _Count = 20_000
    archive_names_bytes: _Small = 4 << 20
    archive_images: _Count = 256
    image_names: _Count = 256
    import_s: _Seconds = 7200


class OverLimit(Exception):
    """Something is above a limit. `key` is the limit's name in `Limits`; the text names all three."""

    def __init__(self, key: str, value: int, limit: int) -> None:
        name = key.removesuffix("_s") + "_seconds" if key.endswith("_s") else key
        self.reason = f"{name.replace('_', ' ')}: {value} is above the limit of {limit} ({TABLE}.{key})"
        super().__init__(self.reason)
        self.key = key
        self.value = value
        self.limit = limit


class Stopped(Exception):
    """The work ended early because its caller set `stop`."""


class Budget:
    """What may be spent of one limit, over many steps. `key` is the limit's name."""

    __slots__ = ("key", "limit", "spent")

    def __init__(self, limits: Limits, key: str) -> None:
        self.key = key
        self.limit: int = getattr(limits, key)
        self.spent = 0

    def spend(self, amount: int = 1) -> None:
        """Spend some. Raises OverLimit as soon as more than the limit is spent in all."""
        self.spent += amount
        if self.spent > self.limit:
            raise OverLimit(self.key, self.spent, self.limit)

    def check(self, value: int) -> None:
        """Raise OverLimit if `value` alone is above the limit. Spends nothing."""
        if value > self.limit:
            raise OverLimit(self.key, value, self.limit)


def check(limits: Limits, key: str, value: int) -> None:
    """Raise OverLimit if `value` is above the limit of this name."""
    Budget(limits, key).check(value)


class Watch:
    """Ends blocking work that its caller does not want any more, or that takes longer than a limit.

    Begins with its creation; `key` names a limit in seconds. `check` is called at every read and every entry.
    """

    def __init__(self, limits: Limits, key: str, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self._budget = Budget(limits, key)
        self._begun = time.monotonic()

    def check(self) -> None:
        """Raises Stopped, OverLimit."""
        if self.stop.is_set():
            raise Stopped
        self._budget.check(int(time.monotonic() - self._begun))
