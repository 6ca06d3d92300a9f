"""A pod's network: its namespace, its CNI attachments, and the tap devices that carry them to a VM.

    prepare    namespace ─> the tap of its first interface, for a VM that is there before the interface
    up         held file ─> namespace, unless prepared ─> ADD of each plug-in ─> facts of the interfaces
               ─> redirect to the tap, if prepared
    open_taps  taps and redirects of the interfaces that have none
    down       DEL of each plug-in ─> namespace ─> held file

Everything is found by the pod id: the held file (see `held`), the namespace `<netns_dir>/<pod id>`,
and in it the interfaces. So `down` works for whatever a daemon that was killed had got to.

The event loop does no work here: each verb is plain blocking code in a thread of its own. Verbs of
one pod wait for each other; GC waits for all and lets none begin (CNI SPEC, "Lifecycle & Ordering").
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Event

import msgspec

from network import netns
from network.attachment_cache import AttachmentCache, CachedAttachment, CacheUnreadable
from network.capabilities import capability_args, cni_args
from network.cni import Cni
from network.errors import NetnsError, NetworkNotReady, TapError, TeardownFailed, Unsatisfiable
from network.links import list_links, open_netlink, read_links
from network.plugins import Plugins
from network.readiness import Readiness
from network.result import Result
from network.spec import Attachment, Dns, Interface, NetworkRequest, NetworkStatus, PortMapping, Route
from network.tap import FIRST_TAP, join, open_tap, open_taps
from sandbox.host import threads
from sandbox.host.keyed_lock import KeyedLock

__all__ = [
    "Attachment",
    "Dns",
    "Interface",
    "NetworkRequest",
    "NetworkStatus",
    "Networks",
    "PortMapping",
    "Route",
]

log = logging.getLogger(__name__)

IFNAME = "eth0"  # what Kubernetes' clients expect of a pod's first interface
_POD_CIDR = "pod-cidr"


class Networks:
    """All pods' networks. `status` and `list_leftovers` may be called at any time."""

    def __init__(
        self,
        *,
        conf_dir: Path,
        bin_dirs: Sequence[Path],
        cache_dir: Path,
        netns_dir: Path,
        plugin_timeout_s: float = 60.0,
    ) -> None:
        self._cni = Cni(Plugins(tuple(bin_dirs), plugin_timeout_s))
        self._readiness = Readiness(conf_dir, self._cni)
        self._held = AttachmentCache(cache_dir)
        self._netns_dir = netns_dir
        self._pod_cidr_file = cache_dir / _POD_CIDR
        self._locks = KeyedLock()

    def status(self) -> NetworkStatus:
        """Whether a pod could be attached now; cheap, reads files only when they changed."""
        return self._readiness.status()

    async def prepare(self, pod_id: str) -> int:
        """Make the namespace, and in it the first interface's tap; the caller owns the descriptor.

        On failure, or when cancelled, nothing is left. Raises NetnsError, TapError, Unsatisfiable.
        """
        async with self._locks.hold(pod_id):
            return await threads.run(
                lambda: self._prepare(pod_id),
                "husk-network",
                discard=lambda tap: self._unprepare(pod_id, tap),
            )

    def netns_of(self, pod_id: str) -> Path:
        return self._netns_dir / pod_id

    async def up(self, wish: NetworkRequest) -> Attachment:
        """Attach the pod. On failure, or when cancelled, nothing is left but what was prepared.

        Raises NetworkNotReady, Unsatisfiable, CniError, NetnsError, TapError.
        """
        cancelled = Event()
        async with self._locks.hold(wish.pod_id):
            return await threads.run(
                lambda: self._up(wish, cancelled.is_set),
                "husk-network",
                on_cancel=cancelled.set,
                discard=lambda _: self._down(wish.pod_id),
            )

    async def down(self, pod_id: str) -> None:
        """Release all that a pod holds; idempotent. Every plug-in gets its DEL, whatever others answer.

        Raises TeardownFailed when a plug-in would not DEL: what the next try needs is kept.
        """
        cancelled = Event()
        async with self._locks.hold(pod_id):
            await threads.run(
                lambda: self._down(pod_id, cancelled.is_set), "husk-network", on_cancel=cancelled.set
            )

    async def detach(self, pod_id: str) -> None:
        """Undo `up`, and leave the namespace; idempotent. Raises TeardownFailed as `down` does."""
        cancelled = Event()
        async with self._locks.hold(pod_id):
            await threads.run(
                lambda: self._detach(pod_id, cancelled.is_set), "husk-network", on_cancel=cancelled.set
            )

    async def open_taps(self, pod_id: str, *, begin: int = 0) -> tuple[int, ...]:
        """Make the taps of interface number `begin` and those behind it, and join them; the caller owns
        the descriptors.

        In the order of Attachment.interfaces. Raises TapError, NetnsError.
        """
        async with self._locks.hold(pod_id):
            return await threads.run(lambda: self._open_taps(pod_id, begin), "husk-network", discard=_close)

    async def check(self, pod_id: str) -> None:
        """Ask the plug-ins whether the attachment is as they left it. Raises CniError, TapError."""
        async with self._locks.hold(pod_id):
            await threads.run(lambda: self._cni.check(self._attached(pod_id)), "husk-network")

    async def gc(self, valid: Iterable[str], *, ask_plugins: bool = True) -> None:
        """Release what belongs to no valid pod, ours and then the plug-ins'. Raises TeardownFailed.

        `valid` names every pod that is not to be released, also those that are being started. The
        plug-ins' GC knows only networks, not runtimes: with `ask_plugins` it takes away what another
        runtime or daemon holds in the same network, so only the network's sole user may ask.
        """
        keep = frozenset(valid)
        problems: list[Exception] = []
        for pod_id in self.list_leftovers():
            if pod_id not in keep:
                try:
                    await self.down(pod_id)
                except TeardownFailed as error:
                    problems += error.problems
        if ask_plugins:
            async with self._locks.hold_all():
                problems += await threads.run(lambda: self._collect(keep), "husk-network")
        if problems:
            raise TeardownFailed("(none)", problems)

    def list_leftovers(self) -> tuple[str, ...]:
        """Ids of all pods that hold anything: those that run, and those that something forgot."""
        found = set(self._held.pod_ids())
        if self._netns_dir.is_dir():
            found |= {path.name for path in self._netns_dir.iterdir()}
        return tuple(sorted(found))

    def update_pod_cidr(self, cidr: str) -> None:
        """Remember the node's pod CIDR, or several between commas (CRI, UpdateRuntimeConfig).

        Pods made from now on pass it as the `ipRanges` capability to plug-ins that declare that:
        host-local then allocates from it. Kept on disk, as a kubelet sends it only when it changes.
        Raises Unsatisfiable.
        """
        cidrs = [each.strip() for each in cidr.split(",") if each.strip()]
        for each in cidrs:
            try:
                ipaddress.ip_network(each)
            except ValueError as error:
                raise Unsatisfiable("pod_cidr", str(error)) from error
        self._pod_cidr_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._pod_cidr_file.write_text(",".join(cidrs))

    # ------------------------------------------------------------------- blocking, in threads

    def _prepare(self, pod_id: str) -> int:
        path = self.netns_of(pod_id)
        if path.exists():
            raise Unsatisfiable("pod_id", f"{pod_id} holds a network already; take that down first")
        netns.make(path)
        try:
            return netns.run_in(path, lambda: open_tap(FIRST_TAP))
        except BaseException:
            self._down(pod_id)
            raise

    def _unprepare(self, pod_id: str, tap: int) -> None:
        os.close(tap)
        self._down(pod_id)

    def _up(self, wish: NetworkRequest, cancelled: Callable[[], bool]) -> Attachment:
        held = self._plan(wish)
        if self._held.load(wish.pod_id):
            raise Unsatisfiable("pod_id", f"{wish.pod_id} is attached already; take that down first")
        path = Path(held.netns)
        prepared = path.exists()
        try:
            self._held.save(held, durable=True)
            if not prepared:
                netns.make(path)
            held = self._cni.add(held, self._held.save, cancelled)
            attachment = self._describe(held)
            self._held.save(_with(held, attachment))
        except BaseException as error:
            undo_all = self._detach if prepared else self._down
            try:
                undo_all(wish.pod_id)
            except TeardownFailed as undo:
                error.add_note(f"and was not wholly undone: {undo}")
                log.warning("undoing a failed start: %s", undo)
            raise
        return attachment

    def _plan(self, wish: NetworkRequest) -> CachedAttachment:
        conf = self._readiness.conf()
        self._cni.check_installed(conf)
        return CachedAttachment(
            pod_id=wish.pod_id,
            netns=str(self.netns_of(wish.pod_id)),
            ifname=IFNAME,
            conf=conf,
            args=cni_args(wish),
            capabilities=capability_args(wish, self._pod_cidrs()),
        )

    def _describe(self, held: CachedAttachment) -> Attachment:
        result = held.result or Result()
        interfaces, routes = netns.run_in(Path(held.netns), lambda: _read_and_join(result))
        dns = result.dns
        return Attachment(
            netns=held.netns,
            interfaces=interfaces,
            routes=routes,
            ips=_pod_ips(result, interfaces[0]),
            dns_servers=dns.nameservers,
            dns_searches=tuple(dict.fromkeys((*filter(None, [dns.domain]), *dns.search))),
            dns_options=dns.options,
        )

    def _down(self, pod_id: str, cancelled: Callable[[], bool] = lambda: False) -> None:
        path = self._delete(pod_id, cancelled)
        try:
            netns.remove(path)
        except NetnsError as error:
            raise TeardownFailed(pod_id, [error]) from error
        self._held.forget(pod_id)

    def _detach(self, pod_id: str, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._delete(pod_id, cancelled)
        self._held.forget(pod_id)

    def _delete(self, pod_id: str, cancelled: Callable[[], bool] = lambda: False) -> Path:
        """DEL of each plug-in, in the namespace whose path is returned. Raises TeardownFailed."""
        path = self.netns_of(pod_id)
        problems: Sequence[Exception] = ()
        try:
            held = self._held.load(pod_id)
            if held is not None:
                path = Path(held.netns)
                problems = self._cni.delete(held, cancelled)
        except CacheUnreadable as error:
            log.error("%s; its plug-ins are told to DEL by the configuration of today", error)
            self._delete_blindly(pod_id)
        if problems:
            # the namespace stays for the next DEL: some plug-ins look there for what they are to undo
            raise TeardownFailed(pod_id, problems)
        return path

    def _delete_blindly(self, pod_id: str) -> None:
        """DEL with what is still known. Failures are only logged.

        Most plug-ins find what is theirs by the pod id; portmap does nothing unless told of ports.
        """
        try:
            conf = self._readiness.conf()
        except NetworkNotReady as error:
            log.error("what the network of pod %s holds outside is left to gc: %s", pod_id, error)
            return
        held = CachedAttachment(
            pod_id=pod_id,
            netns=str(self._netns_dir / pod_id),
            ifname=IFNAME,
            conf=conf,
            args=f"IgnoreUnknown=1;K8S_POD_INFRA_CONTAINER_ID={pod_id}",
            begun=len(conf.plugins),
        )
        for problem in self._cni.delete(held):
            log.error("%s", problem)

    def _open_taps(self, pod_id: str, begin: int) -> tuple[int, ...]:
        held = self._attached(pod_id)
        assert held.attachment is not None
        wanted = held.attachment.interfaces[begin:]
        return netns.run_in(Path(held.netns), lambda: open_taps(wanted)) if wanted else ()

    def _attached(self, pod_id: str) -> CachedAttachment:
        held = self._held.load(pod_id)
        if held is None or held.attachment is None:
            raise TapError("(none)", "find", f"pod {pod_id} has no network that is up")
        return held

    def _collect(self, valid: frozenset[str]) -> list[Exception]:
        try:
            conf = self._readiness.conf()
        except NetworkNotReady:
            return []
        # a pod that began meanwhile is no leftover of anybody
        owners = valid | set(self.list_leftovers())
        return list(self._cni.collect(conf, [(pod_id, IFNAME) for pod_id in sorted(owners)]))

    def _pod_cidrs(self) -> tuple[str, ...]:
        try:
            text = self._pod_cidr_file.read_text()
        except FileNotFoundError:
            return ()
        return tuple(filter(None, text.split(",")))


def _close(taps: tuple[int, ...]) -> None:
    for tap in taps:
        os.close(tap)


def _read_and_join(result: Result) -> tuple[tuple[Interface, ...], tuple[Route, ...]]:
    """What the plug-ins made, once the first interface is carried to its tap, if that is prepared."""
    with open_netlink() as netlink:
        links = list_links(netlink)
        interfaces, routes = read_links(netlink, links, result)
        if interfaces[0].tap in links:
            join(netlink, links, interfaces[0])
    return interfaces, routes


def _with(held: CachedAttachment, attachment: Attachment) -> CachedAttachment:
    return msgspec.structs.replace(held, attachment=attachment)


def _pod_ips(result: Result, first: Interface) -> tuple[str, ...]:
    """Addresses of the first interface as the plug-ins ordered them: the first is the pod's own.

    Plug-ins need not say which interface an address is on; then it counts as the first's. Where the
    result has none, what the kernel has.
    """
    interfaces = result.interfaces or ()
    ips = [
        each.address
        for each in result.ips or ()
        if each.interface is None or interfaces[each.interface].name == first.name
    ]
    return tuple(str(ipaddress.ip_interface(cidr).ip) for cidr in ips or first.addresses)
