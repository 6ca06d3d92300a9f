"""What is held for each pod: one JSON file per pod, from before the first effect to after the last.

    <directory>/<pod id>.json       what DEL needs: configuration, arguments, result so far
    <directory>/<pod id>.json.tmp   being written; left behind by a crash, no more than litter

The configuration is stored with the pod because the administrator may change or delete its file
while pods run. The file is made before the namespace, and rewritten after each plug-in's ADD: a
plug-in whose result is not in it yet is still among those `begun`, so it gets its DEL.

The first write reaches the disk before anything else happens: address leases outlive a reboot, and
so must the means to give them back.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from network.conf import NetworkConf
from network.errors import NetworkError
from network.result import Result
from network.spec import Attachment
from sandbox.host import files

_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")  # CNI SPEC, CNI_CONTAINERID


class CachedAttachment(msgspec.Struct, frozen=True, kw_only=True):
    pod_id: str
    netns: str
    ifname: str
    conf: NetworkConf
    args: str
    capabilities: dict[str, msgspec.Raw] = {}
    begun: int = 0  # so many plug-ins of the list were asked to ADD
    result: Result | None = None  # of the last one that answered
    attachment: Attachment | None = None  # once it is up


class CacheUnreadable(NetworkError):
    """The file of a pod was damaged by something other than Husk; DEL has to do without it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be read: {problem}")
        self.path = path


class AttachmentCache:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, pod_id: str) -> CachedAttachment | None:
        """Raises CacheUnreadable."""
        path = self._path(pod_id)
        try:
            return msgspec.json.decode(path.read_bytes(), type=CachedAttachment)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise CacheUnreadable(path, str(error)) from error

    def save(self, held: CachedAttachment, *, durable: bool = False) -> None:
        """Readers see the old content or the new. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_json(self._path(held.pod_id), held, durable=durable)

    def forget(self, pod_id: str) -> None:
        path = self._path(pod_id)
        path.unlink(missing_ok=True)
        files.temporary_of(path).unlink(missing_ok=True)

    def pod_ids(self) -> frozenset[str]:
        try:
            names = [path.name for path in self._directory.iterdir()]
        except FileNotFoundError:
            return frozenset()
        found = (re.fullmatch(r"(.+)\.json(\.tmp)?", name) for name in names)
        return frozenset(match[1] for match in found if match)

    def _path(self, pod_id: str) -> Path:
        if not _ID.fullmatch(pod_id):
            raise ValueError(f"{pod_id!r} is not an id")
        return self._directory / f"{pod_id}.json"
