"""Records on disk: one JSON file per object, under `<root>/pods` and `<root>/containers`.

    <directory>/<id>.json       the record
    <directory>/<id>.json.tmp   being written; left by a crash, deleted at the next start

A write is a rename, so a reader sees the old record or the new one. Nothing is fsynced: the records must
outlive the daemon, not the machine, and after a reboot no VM is left that they could describe.

A file that cannot be read, decoded or understood, or does not fit its checksum, is quarantined: it stays in
its place, untouched, and what belongs to its id is left alone until a client removes the object under that id
(see `quarantine`).
A record that is lost or broken must never free what it described.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec

from sandbox.host import files
from sandbox.migrations import migrate
from sandbox.records import VERSION, ContainerRecord, PodRecord

log = logging.getLogger(__name__)


class Identified(Protocol):
    """What every record has."""

    @property
    def id(self) -> str:
        """Names the record's file."""

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of steps that may hold something."""


R = TypeVar("R", bound=Identified)
RETRY_NS = 300 * 10**9  # longer than clients wait for a call: a kubelet does for up to 4 minutes
_KINDS: dict[type, str] = {PodRecord: "pod", ContainerRecord: "container"}


class Unreadable(Exception):
    """A record's file exists and does not hold a record of its id. The text says why."""


class _Version(msgspec.Struct):
    version: object = 1


def read_record(path: Path, id: str, type: type[R]) -> R:
    """Read the record of `id` from its file. Raises Unreadable."""
    try:
        text = path.read_bytes()
        if msgspec.json.decode(text, type=_Version).version == VERSION:
            record = msgspec.json.decode(text, type=type)
        else:
            record = msgspec.convert(migrate(_KINDS[type], msgspec.json.decode(text)), type)
        if record.id == id:
            files.check(path, text)
    except OSError as error:
        raise Unreadable(f"it cannot be read: {error.strerror or error}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError, files.Damaged) as error:
        raise Unreadable(str(error)) from error
    if record.id != id:
        raise Unreadable(f"it holds the record of another id, {record.id[:64]!r}")
    return record


class Store(Generic[R]):
    """All records of one kind, in memory as in `directory`. Belongs to one event loop; its methods block
    for as long as small files take. `quarantined` says by id why a record could not be loaded."""

    def __init__(self, directory: Path, kind: type[R]) -> None:
        self.directory = directory
        self.kind = _KINDS[kind]
        self.quarantined: dict[str, str] = {}
        self._type = kind
        self._records: dict[str, R] = {}
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(self) -> None:
        """Read what is on disk. A file that cannot be read is quarantined and never blocks the rest.
        Raises OSError if the directory cannot be listed: then nothing may be taken for absent."""
        for path in sorted(self.directory.iterdir()):
            if path.name.endswith(f".json{files.TEMPORARY_SUFFIX}"):
                path.unlink()
            elif path.name.endswith(".json"):
                self._load_one(path, path.name.removesuffix(".json"))

    def _load_one(self, path: Path, id: str) -> None:
        try:
            self._records[id] = read_record(path, id, self._type)
        except Unreadable as error:
            self.quarantined[id] = str(error)

    def set_aside(self, id: str, reason: str) -> None:
        """Quarantine an id whose record was loaded, or does not exist, for a reason found elsewhere."""
        self._records.pop(id, None)
        self.quarantined[id] = reason

    def put(self, record: R) -> None:
        """Write `record`, then make it the one that readers see. Raises OSError; then the old one stays."""
        files.write_json(self.path(record.id), record, checksum=True)
        self._records[record.id] = record

    def drop(self, id: str) -> None:
        """Delete the record, a quarantined one too. Idempotent. Raises OSError."""
        self.path(id).unlink(missing_ok=True)
        self._records.pop(id, None)
        self.quarantined.pop(id, None)

    def get(self, id: str) -> R | None:
        """Return the record with this id, if it is there and was not quarantined."""
        return self._records.get(id)

    def __iter__(self) -> Iterator[R]:
        return iter(list(self._records.values()))

    def __len__(self) -> int:
        return len(self._records)

    def path(self, id: str) -> Path:
        """Return the path of the record's file."""
        return self.directory / f"{id}.json"


class Unwritten(Store[R]):
    """Holds records that stand in for quarantined ones: in memory alone, as the file is evidence."""

    def __init__(self, store: Store[R]) -> None:
        self.directory = store.directory
        self._store = store
        self._records = {}

    def put(self, record: R) -> None:
        """Keep the record in memory."""
        self._records[record.id] = record

    def drop(self, id: str) -> None:
        """Delete the quarantined file. Idempotent. Raises OSError."""
        self._store.drop(id)
        self._records.pop(id, None)


class Recorded(Generic[R]):
    """An object in memory and the record that survives it. The record changes on disk first."""

    def __init__(self, record: R, store: Store[R]) -> None:
        self.record = record
        self._store = store
        self.recovered_ns = 0  # when this daemon found it, by the wall clock; 0: this daemon made it

    def may_be_unanswered(self, done_ns: int) -> bool:
        """Whether a client may still wait for the answer to what was done at `done_ns`: the daemon ended soon
        after that, and the client retries."""
        return done_ns > 0 and 0 < self.recovered_ns <= done_ns + RETRY_NS

    @property
    def quarantined(self) -> bool:
        """Whether `record` only stands in for one that could not be loaded: hardly a field of it is true."""
        return isinstance(self._store, Unwritten)

    def update(self, **changes: object) -> None:
        """Write changes to the record. Raises OSError; then the record stays as it was."""
        record = msgspec.structs.replace(self.record, **changes)  # type: ignore[type-var]
        self._store.put(record)
        self.record = record

    def update_anyway(self, **changes: object) -> None:
        """Write changes to the record, for what has happened already or must not depend on a full disk.

        Where it cannot be written, the change counts until the daemon ends, and the file is stale.
        """
        try:
            Recorded.update(self, **changes)
        except OSError as error:
            log.warning("record %s could not be rewritten and is stale: %s", self.record.id, error)
            self.record = msgspec.structs.replace(self.record, **changes)  # type: ignore[type-var]

    def begin(self, steps: Iterable[str]) -> None:
        """Save the names of steps, before their effects. Raises OSError."""
        new = [step for step in steps if step not in self.record.steps]
        if new:
            self.update(steps=(*self.record.steps, *new))

    def ended(self, steps: Collection[str]) -> None:
        """Remove the names of steps that hold nothing any more.

        Where that cannot be written, they stay in the file: what holds nothing may be released again, and a
        full disk must not keep anything from being released.
        """
        left = tuple(name for name in self.record.steps if name not in steps)
        if left == self.record.steps:
            return
        try:
            self.update(steps=left)
        except OSError as error:
            log.warning("record %s could not be rewritten and is stale: %s", self.record.id, error)
            self.record = msgspec.structs.replace(self.record, steps=left)  # type: ignore[type-var]

    def forget(self) -> None:
        """Delete the record. Idempotent. Raises OSError."""
        self._store.drop(self.record.id)
