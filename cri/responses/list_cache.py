"""Responses that encode only the items that have changed.

A kubelet requests both lists every second and statuses often, and most items have not changed since. Records
are immutable, so the encoding of one is valid as long as the same object is listed. A message of the form
`repeated Item items = 1` is the concatenation of its encoded items (protobuf encoding, "Last One Wins"), each
after its tag and length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from google.protobuf.message import Message

R = TypeVar("R")

BATCH_BYTES = 256 << 10  # of a streamed list; far below what a client accepts in one message
ITEM_TAG = b"\x0a"  # field 1, length-delimited


class ListCache(Generic[R]):
    """Encodes list messages, and caches the bytes of each item by `key`."""

    def __init__(self, key: Callable[[R], Hashable], encode: Callable[[R], Message]) -> None:
        self._key = key
        self._encode = encode
        self._known: dict[Hashable, tuple[R, bytes]] = {}

    def of(self, records: Iterable[R]) -> bytes:
        """Return the encoded list message of these records."""
        known, key, item = self._known.get, self._key, self._item
        return b"".join(
            [
                found[1] if (found := known(key(record))) is not None and found[0] is record else item(record)
                for record in records
            ]
        )

    def batches(self, records: Iterable[R]) -> Iterator[bytes]:
        """Yield the list in messages of about BATCH_BYTES, each with at least one item (CRI, Stream*)."""
        batch: list[bytes] = []
        size = 0
        for record in records:
            item = self._item(record)
            if batch and size + len(item) > BATCH_BYTES:
                yield b"".join(batch)
                batch, size = [], 0
            batch.append(item)
            size += len(item)
        if batch:
            yield b"".join(batch)

    def drop(self, key: Hashable) -> None:
        """Drop the cached item with this key. Idempotent."""
        self._known.pop(key, None)

    def keep_only(self, records: Sequence[R]) -> None:
        """Drop cached items that no longer exist. `records` is the whole list, not a filtered one."""
        if len(records) < len(self._known):
            live = {self._key(record) for record in records}
            self._known = {key: item for key, item in self._known.items() if key in live}

    def _item(self, record: R) -> bytes:
        key = self._key(record)
        known = self._known.get(key)
        if known is not None and known[0] is record:
            return known[1]
        body = self._encode(record).SerializeToString()
        item = ITEM_TAG + _varint(len(body)) + body
        self._known[key] = (record, item)
        return item


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
