"""Exports: trees of the host in the share that a pod's containers have in common.

    back/volumes/KEY    an empty directory or file, on which a tree is mounted in virtiofsd's namespace

virtiofsd knows a file by device, inode number and mount. So a tree that were mounted twice would be two
file systems in the guest: locks, sockets, FIFOs, shared memory and inotify would not meet. Therefore a tree
is exported once, and a mount whose tree lies beneath an exported one uses that export and the path in it.
Trees are recognised by the exporter's mount table (see `host.mountinfo`), and by their inode, as a path in
it may be covered by another mount. When a tree is exported after a part of it, the guest mounts the part's
export over its place in the whole.

Mounts share an export if they also agree in what cannot be different within one: whether later mounts of
the host appear in it, how owners are shifted, and whether the host's own mount is read-only. An export is
read-only on the host's side as long as all mounts that use it are.

Crash story: the record of a container names the exports that it uses or is about to make. Deleting the
mount point of one detaches what is mounted on it in other namespaces (rmdir(2) does, since Linux 3.18), so
no process is needed to undo; and they end with the virtiofsd.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sandbox.container import Container
from sandbox.errors import VmmGone
from sandbox.host import mountinfo, mounts, process
from sandbox.host.mountinfo import Mounted, Tree
from sandbox.host.openat import open_beneath
from sandbox.plan.shares import GUEST_UNCACHED, GUEST_VOLUMES, UNCACHED_TAG, VOLUMES_TAG
from sandbox.pod import Pod
from sandbox.records import VolumePart, VolumeUse
from sandbox.spec import MountSpec, Propagation, UserNamespace
from sandbox.vm_pods.runtime import runtime_of

T = TypeVar("T")

GONE = "virtiofsd for volumes has ended"
EAGER_SUBMOUNTS = 16  # of one export; further ones are mounted by each container that opens them


@dataclass(frozen=True, slots=True)
class Kind:
    """What all mounts that share an export have in common."""

    receives: bool  # later mounts of the host
    ids: UserNamespace | None
    frozen: bool  # the host's own mount is read-only
    uncached: bool  # it is in another share, see `uncached`


def kind_of(mount: MountSpec, *, frozen: bool, uncached: bool) -> Kind:
    """Return the kind of export that a mount of a specification needs."""
    return Kind(mount.propagation is not Propagation.PRIVATE, mount.ids, frozen, uncached)


@dataclass(slots=True)
class Wanted:
    """A mount of a container that is about to be exported."""

    number: int  # in the specification's mounts
    mount: MountSpec
    source: int  # O_PATH descriptor
    tree: Tree | None
    clone: int  # detached copy of the source's mount tree, with its attributes
    key: str  # of a new export, if it needs one
    uncached: bool = False

    @property
    def kind(self) -> Kind:
        """Return the kind of export that it needs."""
        frozen = self.tree.readonly if self.tree else False
        return kind_of(self.mount, frozen=frozen, uncached=self.uncached)

    @property
    def recursive(self) -> bool:
        """Whether what is mounted beneath the source is read-only too."""
        return self.mount.recursive_readonly or bool(self.mount.image)


@dataclass(slots=True)
class Export:
    """An export that is mounted, or is being made."""

    key: str
    kind: Kind
    parts: tuple[VolumePart, ...] = ()
    made: bool = False  # by this call
    submounts: list[str] = field(default_factory=list)  # that the guest mounts at once


def known_exports(containers: Iterable[Container]) -> dict[str, Export]:
    """Return the exports in use, by the records of containers."""
    found: dict[str, Export] = {}
    for container in containers:
        for use in container.record.volumes:
            mount = container.record.spec.mounts[use.mount]
            kind = kind_of(mount, frozen=use.frozen, uncached=use.uncached)
            found[use.export] = Export(use.export, kind, use.parts)
    return found


def names_in_use(containers: Iterable[Container]) -> set[str]:
    """Return the keys of all exports that these containers use, parts of others included."""
    uses = [use for container in containers for use in container.record.volumes]
    return {use.export for use in uses} | {part.export for use in uses for part in use.parts}


def guest_place(use: VolumeUse | VolumePart) -> str:
    """Return where the guest has the export of a mount, or of a part."""
    return f"{GUEST_UNCACHED if use.uncached else GUEST_VOLUMES}/{use.export}"


# ------------------------------------------------------------------------------------ the exporter


class Exporter:
    """What exports a pod's volumes: its mount table, and work in its mount namespace. All methods block.

    `uncached` chooses between its two shares, which have one directory behind them.
    """

    def __init__(self, pod: Pod, *, uncached: bool = False) -> None:
        handle = runtime_of(pod).handle
        self._process = handle.helpers.get(UNCACHED_TAG if uncached else VOLUMES_TAG) if handle else None
        # the share is the root of virtiofsd; a VMM that exports it by itself sees it as the daemon does
        self.root = Path("/") if self._process else pod.volumes_share
        self._table: io.FileIO

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep its mount table open for the body: there is no /proc in its namespace. Raises VmmGone."""
        pid = "self" if self._process is None else self._process.pid
        try:
            self._table = Path(f"/proc/{pid}/mountinfo").open("rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise VmmGone(GONE) from error
        with self._table:
            yield

    def run(self, action: Callable[[], T]) -> T:
        """Run `action` in the namespace. Raises what it raises, and VmmGone when virtiofsd has ended."""
        if self._process is None:
            return action()
        try:
            namespace = os.open(f"/proc/{self._process.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise VmmGone(GONE) from error
        try:
            if not process.alive(self._process):
                raise VmmGone(GONE)
            return mounts.in_namespace(namespace, action)
        finally:
            os.close(namespace)

    def table(self) -> list[Mounted]:
        """Return its mounts as they are now, while it is opened, with points relative to the share ("KEY",
        "KEY/sub")."""
        self._table.seek(0)
        return list(_relative_to(str(self.root), mountinfo.parse(self._table.readall())))


def _relative_to(root: str, table: Iterable[Mounted]) -> Iterator[Mounted]:
    for line in table:
        if point := mountinfo.relative(line.point, root):
            yield Mounted(line.id, line.device, line.root, point, line.readonly, line.kind)


# ------------------------------------------------------------------------------------ exporting


def attach(
    exporter: Exporter, back: Path, wanted: Iterable[Wanted], known: dict[str, Export]
) -> list[VolumeUse]:
    """Give each wanted mount a place in an export: in a known one, which is made writable where needed, or
    in a new one. Returns the places.

    `back` is the writable directory behind the share, `known` are the exports in use, which get the new ones.
    Whole trees come before their parts. Blocking. Raises OSError, VmmGone.
    """
    ordered = sorted(wanted, key=lambda each: len(each.tree.path or "") if each.tree else 0)
    places: dict[int, tuple[Export, str]] = {}

    def work() -> None:
        table = exporter.table()
        for each in ordered:
            places[each.number] = _place(exporter.root, points, each, known, table)

    if ordered:
        with exporter.opened():
            points = os.open(back, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # has no path in there
            try:
                exporter.run(work)
            finally:
                os.close(points)
    return [
        VolumeUse(
            mount=each.number,
            export=places[each.number][0].key,
            path=places[each.number][1],
            frozen=each.kind.frozen,
            parts=places[each.number][0].parts,
            uncached=each.uncached,
        )
        for each in ordered
    ]


def relax(exporter: Exporter, wanted: Iterable[tuple[Wanted, str]]) -> None:
    """Make exports writable as far as mounts of them, given with the export's key, may be written, and the
    host's own mounts may. Blocking. Raises OSError, VmmGone."""

    def work() -> None:
        table = exporter.table()
        for each, key in wanted:
            _relax(exporter.root, each, key, "", table)

    with exporter.opened():
        exporter.run(work)


def _place(
    root: Path, points: int, wanted: Wanted, known: dict[str, Export], table: list[Mounted]
) -> tuple[Export, str]:
    """`table` is the exporter's, and gets what is mounted here: reading it for each mount takes longer."""
    export, path = _find(root, wanted, known, table) or (None, "")
    if export is None:
        _make_point(points, wanted)
        export = _make(root, wanted, known, table)
    else:
        _relax(root, wanted, export.key, path, table)
    for part in export.parts:
        if _related("/" + part.path, "/" + path):
            _relax(root, wanted, part.export, "", table)
    return export, path


def _related(one: str, other: str) -> bool:
    """Return whether one of two paths lies beneath the other, or they are the same."""
    return mountinfo.relative(one, other) is not None or mountinfo.relative(other, one) is not None


def _find(
    root: Path, wanted: Wanted, known: dict[str, Export], table: list[Mounted]
) -> tuple[Export, str] | None:
    """Return the export that the tree is, or lies beneath, and the path in it."""
    tree, identity = wanted.tree, _identity(os.fstat(wanted.source))
    if tree is None:
        return None
    for line in table:
        key, _, inside = line.point.partition("/")
        export = known.get(key)
        if export is None or export.kind != wanted.kind or line.device != tree.device:
            continue
        beneath = "" if tree.path is None else mountinfo.relative(tree.path, line.root)
        if beneath is None:
            continue
        path = "/".join(filter(None, (inside, beneath)))
        if _identity_at(root / key, path) == identity:
            return export, path
    return None


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _identity_at(top: Path, path: str) -> tuple[int, int] | None:
    """Identify what lies at a path of an export; None: nothing, or a link leads there."""
    try:
        if not path:
            return _identity(top.lstat())
        found = open_beneath(top, path, os.O_PATH | os.O_NOFOLLOW, links=False)
    except OSError:
        return None
    try:
        return _identity(os.fstat(found))
    finally:
        os.close(found)


def _make(root: Path, wanted: Wanted, known: dict[str, Export], table: list[Mounted]) -> Export:
    point = root / wanted.key
    target = os.open(point, os.O_PATH | os.O_CLOEXEC)
    try:
        mounts.attach_tree(wanted.clone, target, point)
    finally:
        os.close(target)
    tree = wanted.tree
    if tree and tree.path is not None:
        table += _lines_of(wanted, tree, tree.path)
    # nothing is cached, so it does not matter that a part is another file system there
    parts = () if wanted.uncached else _parts(root, wanted, known, table)
    export = Export(wanted.key, wanted.kind, parts, made=True)
    if tree and not export.kind.receives:  # what the host unmounts later must not be busy
        near = [path for path, line in sorted(tree.submounts.items()) if not line.remote]
        export.submounts = near[:EAGER_SUBMOUNTS]
    known[export.key] = export
    return export


def _lines_of(wanted: Wanted, tree: Tree, path: str) -> Iterator[Mounted]:
    """The mounts of a new export, as the exporter's table has them."""
    readonly = wanted.mount.readonly or tree.readonly
    yield Mounted(0, tree.device, path, wanted.key, readonly, "")
    for beneath, line in tree.submounts.items():
        readonly = line.readonly or (wanted.mount.readonly and wanted.recursive)
        yield Mounted(0, line.device, line.root, f"{wanted.key}/{beneath}", readonly, line.kind)


def _parts(
    root: Path, wanted: Wanted, known: dict[str, Export], table: list[Mounted]
) -> tuple[VolumePart, ...]:
    """Find the exports whose trees lie in the new one, and where. Those of an outer part come first."""
    tops = {line.point: line for line in table if line.point in known}
    own = [line for line in table if line.point.partition("/")[0] == wanted.key]
    found = []
    for key, top in tops.items():
        if known[key].kind != wanted.kind or key == wanted.key:
            continue
        for line in own:
            beneath = mountinfo.relative(top.root, line.root) if line.device == top.device else None
            path = "/".join(filter(None, (line.point.partition("/")[2], beneath)))
            if not path or beneath is None:  # most are: identities take longer
                continue
            if _identity_at(root / wanted.key, path) == _identity_at(root / key, ""):
                found.append(VolumePart(path=path, export=key))
                break
    return tuple(sorted(found, key=lambda part: part.path.count("/")))


def _relax(root: Path, wanted: Wanted, key: str, path: str, table: list[Mounted]) -> None:
    """Make an export writable as far as this mount may be written, and the host's own mounts may."""
    place = f"{key}/{path}" if path else key
    holding = max(
        (line for line in table if mountinfo.relative("/" + place, "/" + line.point) is not None),
        key=lambda line: len(line.point),
        default=None,
    )
    if holding and holding.readonly and not wanted.mount.readonly and not wanted.kind.frozen:
        mounts.make_writable(root / holding.point)
    if wanted.recursive or wanted.tree is None:
        return
    for line in table:
        beneath = mountinfo.relative("/" + line.point, "/" + place)
        of_host = wanted.tree.submounts.get(beneath) if beneath else None
        if line.readonly and of_host and not of_host.readonly:
            mounts.make_writable(root / line.point)


# ------------------------------------------------------------------------------------ mount points


def _make_point(points: int, wanted: Wanted) -> None:
    """Make the mount point of a new export. Raises OSError."""
    if stat.S_ISDIR(os.fstat(wanted.source).st_mode):
        os.mkdir(wanted.key, 0o755, dir_fd=points)
    else:
        os.close(os.open(wanted.key, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=points))


def remove_points(pod: Pod, keys: Iterable[str]) -> None:
    """Remove the mount points of exports, and with them what is mounted there. Idempotent. Raises OSError."""
    back = pod.back_of(pod.volumes_share)
    mounts.unmount_beneath(pod.volumes_share, keys)  # where the VMM itself exports them
    for key in keys:
        with contextlib.suppress(FileNotFoundError):
            try:
                (back / key).rmdir()
            except NotADirectoryError:
                (back / key).unlink()
