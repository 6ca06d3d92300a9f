"""Import the image archives of one directory: those that are there at start, and those that appear later.

    DIR/*.tar, *.tar.gz, *.tgz, *.tar.zst     what `husk image import` takes
    ROOT/images/preloaded.json                which file, by size and time of change, held which images

A file is imported once it has not changed for SETTLE_S. One that was imported before is not read again as
long as its images are stored. One that cannot be imported is logged, and tried again when it changes or at
the next start. Removing a file leaves its images.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from image.errors import ImageError
from image.index import Image
from sandbox.host.files import write_json
from sandbox.host.inotify import Watching
from sandbox.host.tasks import Tasks

log = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
SETTLE_S = 1.0

Import = Callable[[Path], Awaitable[Sequence[Image]]]


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it was seen."""

    size: int
    changed_ns: int


class _Imported(_State, frozen=True, kw_only=True):
    ids: tuple[str, ...]


class Preloader:
    """Imports what lies in `directory`, one archive after the other. Run it once, as a task.

    `is_stored` says of an image's id whether the store has it; `memory` is the file that remembers imports.
    """

    def __init__(
        self,
        tasks: Tasks,
        directory: Path,
        memory: Path,
        import_archive: Import,
        is_stored: Callable[[str], bool],
    ) -> None:
        self._directory = directory
        self._memory = memory
        self._import = import_archive
        self._is_stored = is_stored
        self._imported: dict[str, _Imported] = {}
        self._failed: dict[str, _State] = {}
        self._changed = asyncio.Event()
        self._watching = Watching[Preloader](tasks, "preload directory", lambda _: self._changed.set())

    async def run(self) -> None:
        """Import what is there, then what appears, until cancelled."""
        try:
            await asyncio.to_thread(self._prepare)
        except OSError as error:
            log.warning("preload: %s cannot be used, no image is preloaded: %s", self._directory, error)
            return
        try:
            self._watch()
        except OSError as error:
            log.warning("preload: %s is read at start only: %s", self._directory, error)
        while True:
            self._changed.clear()
            if await self._scan():
                await asyncio.sleep(SETTLE_S)  # some file is still being written
            else:
                await self._changed.wait()

    def _prepare(self) -> None:
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            self._imported = msgspec.json.decode(self._memory.read_bytes(), type=dict[str, _Imported])
        except (OSError, msgspec.DecodeError) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning(
                    "preload: archives are imported again, as %s cannot be read: %s", self._memory, error
                )

    def _watch(self) -> None:
        """Raises OSError."""
        folder = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._watching.open().add(self, folder, str(self._directory))
        finally:
            os.close(folder)

    async def _scan(self) -> bool:
        """Import what is new; return whether there is a file that changes now."""
        found = await asyncio.to_thread(lambda: dict(self._archives()))
        self._failed = {name: state for name, state in self._failed.items() if found.get(name) == state}
        new = [name for name, state in found.items() if self._failed.get(name) != state]
        new = [name for name in new if not self._is_imported(name, found[name])]
        now = time.time_ns()  # a change after now is one before the clock was set back
        settled = [name for name in new if not 0 <= now - found[name].changed_ns < SETTLE_S * 1e9]
        for n, name in enumerate(settled):
            log.info(
                "preload: importing %s, %.1f MB (%d of %d)", name, found[name].size / 1e6, n + 1, len(settled)
            )
            await self._import_one(name, found[name])
        if settled:
            failed = sum(name in self._failed for name in settled)
            log.info("preload: %d archives imported, %d failed", len(settled) - failed, failed)
        return len(new) > len(settled)

    def _archives(self) -> Iterator[tuple[str, _State]]:
        for entry in sorted(self._directory.iterdir()):
            if entry.name.startswith(".") or not entry.name.endswith(SUFFIXES):
                continue
            try:
                status = entry.stat()
            except OSError as error:
                log.warning("preload: %s: %s", entry, error.strerror)
                continue
            if stat.S_ISREG(status.st_mode):
                # ctime: a file that was moved here keeps its mtime
                yield entry.name, _State(size=status.st_size, changed_ns=status.st_ctime_ns)

    def _is_imported(self, name: str, state: _State) -> bool:
        known = self._imported.get(name)
        if known is None or (known.size, known.changed_ns) != (state.size, state.changed_ns):
            return False
        return all(self._is_stored(id) for id in known.ids)

    async def _import_one(self, name: str, state: _State) -> None:
        begun = time.monotonic()
        try:
            images = await self._import(self._directory / name)
        except (ImageError, OSError) as error:
            log.error("preload: %s cannot be imported, it is tried again when it changes: %s", name, error)
            self._failed[name] = state
            return
        names = ", ".join(tag for image in images for tag in (image.repo_tags or (image.id,)))
        log.info("preload: imported %s in %.1f s: %s", name, time.monotonic() - begun, names)
        self._imported[name] = _Imported(
            size=state.size, changed_ns=state.changed_ns, ids=tuple(image.id for image in images)
        )
        try:
            await asyncio.to_thread(write_json, self._memory, self._imported)
        except OSError as error:
            log.warning("preload: %s is imported again at the next start: %s", name, error)
