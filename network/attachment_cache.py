"""What each pod's network holds: one JSON file per pod, from before the first effect to after the last.

    <directory>/<pod id>.json       what DEL needs: configuration, arguments, result so far
    <directory>/<pod id>.json.tmp   being written; one that a crash left has no meaning

The configuration is stored with the pod because the administrator may change or delete its file while pods
run. The file is created before the namespace, and rewritten around each plug-in's ADD: a plug-in whose result
is not in it yet is already counted in `begun`, so it gets its DEL.

The first write is durable before anything else happens: address leases outlive a reboot, so what is needed to
release them must too.
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
    """The state of one pod's attachment: planned (begun is 0), in ADD, or up (attachment is there)."""

    pod_id: str
    netns: str
    ifname: str
    conf: NetworkConf
    args: str  # CNI_ARGS
    capabilities: dict[str, msgspec.Raw] = {}
    begun: int = 0  # how many plug-ins of the list were started for ADD
    result: Result | None = None  # of the last plug-in that succeeded
    attachment: Attachment | None = None  # once it is up


class CacheUnreadable(NetworkError):
    """The file of a pod cannot be read; DEL has to do without it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be read: {problem}")
        self.path = path


class AttachmentCache:
    """The files of all pods in one directory. One writer per pod at a time; pod ids must be CNI ids."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, pod_id: str) -> CachedAttachment | None:
        """Read a pod's file; None if it has none. Raises CacheUnreadable."""
        path = self._path(pod_id)
        try:
            return msgspec.json.decode(path.read_bytes(), type=CachedAttachment)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise CacheUnreadable(path, str(error)) from error

    def save(self, attachment: CachedAttachment, *, durable: bool = False) -> None:
        """Replace the pod's file; `durable` waits for the disk. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_json(self._path(attachment.pod_id), attachment, durable=durable)

    def forget(self, pod_id: str) -> None:
        """Remove the pod's file. Idempotent. Raises OSError."""
        path = self._path(pod_id)
        path.unlink(missing_ok=True)
        files.temporary_of(path).unlink(missing_ok=True)

    def pod_ids(self) -> frozenset[str]:
        """List the pods that have a file, whole or half-written."""
        try:
            names = [path.name for path in self._directory.iterdir()]
        except FileNotFoundError:
            return frozenset()
        found = (re.fullmatch(r"(.+)\.json(\.tmp)?", name) for name in names)
        return frozenset(match[1] for match in found if match)

    def _path(self, pod_id: str) -> Path:
        if not _ID.fullmatch(pod_id):
            raise ValueError(f"{pod_id!r} is not a valid CNI_CONTAINERID")
        return self._directory / f"{pod_id}.json"
