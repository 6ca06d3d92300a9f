"""Records on disk: one JSON file per object, under `<root>/pods` and `<root>/containers`.

    <directory>/<id>.json       the record
    <directory>/<id>.json.tmp   being written; left behind by a crash, swept at the next start
    <directory>/<id>.json.bad   a file that could not be read, set aside for a person to look at

A write is a rename, so a reader sees the old record or the new one. Nothing is fsynced: the records
must outlive the daemon, not the machine, and after a reboot no VM is left that they could describe.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec

from sandbox.host.files import write_json

log = logging.getLogger(__name__)


class Identified(Protocol):
    """What every record has."""

    @property
    def id(self) -> str: ...

    @property
    def steps(self) -> tuple[str, ...]: ...


R = TypeVar("R", bound=Identified)


class Store(Generic[R]):
    """All records of one kind, in memory as in `directory`."""

    def __init__(self, directory: Path, kind: type[R]) -> None:
        self.directory = directory
        self._decoder = msgspec.json.Decoder(kind)
        self._records: dict[str, R] = {}
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(self) -> None:
        """Read what is on disk; one broken file is set aside and never blocks the rest."""
        for leftover in self.directory.glob("*.json.tmp"):
            leftover.unlink()
        for path in sorted(self.directory.glob("*.json")):
            try:
                record = self._decoder.decode(path.read_bytes())
            except (msgspec.DecodeError, OSError) as error:
                log.error("record %s cannot be read and is set aside: %s", path, error)
                path.rename(path.with_suffix(".json.bad"))
                continue
            self._records[record.id] = record

    def put(self, record: R) -> None:
        """Write `record`, then make it the one that readers see."""
        write_json(self._path(record.id), record)
        self._records[record.id] = record

    def drop(self, id: str) -> None:
        self._path(id).unlink(missing_ok=True)
        self._records.pop(id, None)

    def get(self, id: str) -> R | None:
        return self._records.get(id)

    def __iter__(self) -> Iterator[R]:
        return iter(list(self._records.values()))

    def __len__(self) -> int:
        return len(self._records)

    def _path(self, id: str) -> Path:
        return self.directory / f"{id}.json"


class Recorded(Generic[R]):
    """A thing in memory and the record that survives it; the record changes on disk first."""

    def __init__(self, record: R, store: Store[R]) -> None:
        self.record = record
        self._store = store

    def update(self, **changes: object) -> None:
        record = msgspec.structs.replace(self.record, **changes)  # type: ignore[type-var]
        self._store.put(record)
        self.record = record

    def begin(self, steps: Iterable[str]) -> None:
        """Save the names of steps, before their effects."""
        new = [step for step in steps if step not in self.record.steps]
        if new:
            self.update(steps=(*self.record.steps, *new))

    def ended(self, steps: Collection[str]) -> None:
        """These hold nothing any more.

        Where that cannot be written, they stay in the file: what holds nothing may be released again,
        and a full disk must not keep anything from being released.
        """
        left = tuple(name for name in self.record.steps if name not in steps)
        if left == self.record.steps:
            return
        try:
            self.update(steps=left)
        except OSError as error:
            log.warning("record %s is older than what it tells of: %s", self.record.id, error)
            self.record = msgspec.structs.replace(self.record, steps=left)  # type: ignore[type-var]

    def forget(self) -> None:
        self._store.drop(self.record.id)
