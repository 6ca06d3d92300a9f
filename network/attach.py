"""A pod's network: its namespace, its CNI attachment, and the tap devices that connect it to a VM.

    prepare    namespace ─> the tap of its first interface, for a VM that exists before the interface
    up         cache file ─> namespace, unless prepared ─> CNI ADD ─> interfaces as the kernel has them
               ─> redirect to the tap, if prepared
    open_taps  taps and redirects of the interfaces that have none
    check      CNI CHECK
    down       CNI DEL ─> namespace ─> cache file
    gc         `down` of every pod that is not valid ─> CNI GC

The phases of CNI are described in `cni`. Everything is found by the pod id: the cache file (see
`attachment_cache`), the namespace `<netns_dir>/<pod id>`, and in it the interfaces. So `down` works however
far a daemon that was killed had come.

Nothing here blocks the event loop: each operation is plain blocking code in a separate thread. Operations
on one pod wait for each other; GC waits for all and blocks new ones (CNI SPEC, "Lifecycle & Ordering").
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
from network.errors import CniError, NetnsError, NetworkNotReady, TapError, TeardownFailed, Unsatisfiable
from network.links import list_links, open_netlink, read_links
from network.plugins import Plugins
from network.readiness import Readiness
from network.result import Result
from network.spec import (
    IFNAME,
    Attachment,
    Dns,
    Interface,
    NetworkRequest,
    NetworkStatus,
    PublishedPort,
    Route,
)
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
    "PublishedPort",
    "Route",
]

log = logging.getLogger(__name__)

_POD_CIDR = "pod-cidr"


class Networks:
    """The networks of all pods. For one event loop; `status` and `list_leftovers` are safe in any thread.

    An operation whose caller is cancelled is undone, or completed where it releases, before the cancellation
    is raised.
    """

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
        self._cache = AttachmentCache(cache_dir)
        self._netns_dir = netns_dir
        self._pod_cidr_file = cache_dir / _POD_CIDR
        self._locks = KeyedLock()

    def status(self) -> NetworkStatus:
        """Return whether a pod could be attached now. Cheap: reads files only when they have changed."""
        return self._readiness.status()

    async def prepare(self, pod_id: str) -> int:
        """Create the namespace, and in it the tap of the first interface.

        Returns the tap's descriptor, which the caller owns. On failure, or when cancelled, nothing is left.
        Raises NetnsError, TapError, and Unsatisfiable when the pod has a network already.
        """
        async with self._locks.hold(pod_id):
            return await threads.run(
                lambda: self._prepare(pod_id),
                "husk-network",
                discard=lambda tap: self._unprepare(pod_id, tap),
            )

    def netns_of(self, pod_id: str) -> Path:
        """Return the path of a pod's namespace, whether it exists or not."""
        return self._netns_dir / pod_id

    async def up(self, request: NetworkRequest) -> Attachment:
        """Attach the pod by CNI ADD. On failure, or when cancelled, nothing is left but what was prepared.

        Raises NetworkNotReady, Unsatisfiable, CniError, NetnsError, TapError.
        """
        cancelled = Event()
        async with self._locks.hold(request.pod_id):
            return await threads.run(
                lambda: self._up(request, cancelled.is_set),
                "husk-network",
                on_cancel=cancelled.set,
                discard=lambda _: self._down(request.pod_id),
            )

    async def down(self, pod_id: str) -> None:
        """Release all that a pod's network holds. Idempotent. Every plug-in gets its DEL, whatever others
        return.

        Raises TeardownFailed when a plug-in failed to DEL: what a retry needs is kept.
        """
        cancelled = Event()
        async with self._locks.hold(pod_id):
            await threads.run(
                lambda: self._down(pod_id, cancelled.is_set), "husk-network", on_cancel=cancelled.set
            )

    async def detach(self, pod_id: str) -> None:
        """Undo `up`, but keep the namespace. Idempotent. Raises TeardownFailed as `down` does."""
        cancelled = Event()
        async with self._locks.hold(pod_id):
            await threads.run(
                lambda: self._detach(pod_id, cancelled.is_set), "husk-network", on_cancel=cancelled.set
            )

    async def open_taps(self, pod_id: str, *, begin: int = 0) -> tuple[int, ...]:
        """Create and connect the taps of interface number `begin` and those after it.

        Returns their descriptors, which the caller owns, in the order of Attachment.interfaces. Raises
        TapError, also when the pod's network is not up, and NetnsError.
        """
        async with self._locks.hold(pod_id):
            return await threads.run(lambda: self._open_taps(pod_id, begin), "husk-network", discard=_close)

    async def check(self, pod_id: str) -> None:
        """Run CNI CHECK: is the attachment as ADD left it? Raises CniError; TapError when it is not up."""
        async with self._locks.hold(pod_id):
            await threads.run(lambda: self._cni.check(self._attached(pod_id)), "husk-network")

    async def gc(self, valid: Iterable[str], *, ask_plugins: bool = True) -> None:
        """Release what belongs to no valid pod: first what Husk holds, then by CNI GC what plug-ins hold.

        `valid` names every pod that must not be released, also those that are being started. GC knows
        networks, not runtimes: it releases what another runtime or daemon holds in the same network. So
        `ask_plugins` is only for the sole user of the network. Raises TeardownFailed after trying all.
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
            raise TeardownFailed("", problems)

    def list_leftovers(self) -> tuple[str, ...]:
        """List the ids of all pods whose network holds anything: those that run, and leftovers."""
        found = set(self._cache.pod_ids())
        if self._netns_dir.is_dir():
            found |= {path.name for path in self._netns_dir.iterdir()}
        return tuple(sorted(found))

    def update_pod_cidr(self, cidr: str) -> None:
        """Set the node's pod CIDR, or several separated by commas (CRI, UpdateRuntimeConfig).

        It is passed for later pods as the `ipRanges` capability to plug-ins that declare it: host-local then
        allocates from it. Kept on disk, as a kubelet sends it only when it changes. Raises Unsatisfiable.
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
            raise Unsatisfiable("pod_id", f"{pod_id} has a network already; it must be taken down first")
        netns.make(path)
        try:
            return netns.run_in(path, lambda: open_tap(FIRST_TAP))
        except BaseException:
            self._down(pod_id)
            raise

    def _unprepare(self, pod_id: str, tap: int) -> None:
        os.close(tap)
        self._down(pod_id)

    def _up(self, request: NetworkRequest, cancelled: Callable[[], bool]) -> Attachment:
        cached = self._plan(request)
        if self._cache.load(request.pod_id):
            raise Unsatisfiable("pod_id", f"{request.pod_id} is attached already; it must be detached first")
        path = Path(cached.netns)
        prepared = path.exists()
        try:
            self._cache.save(cached, durable=True)
            if not prepared:
                netns.make(path)
            cached = self._cni.add(cached, self._cache.save, cancelled)
            attachment = self._describe(cached)
            self._cache.save(_with(cached, attachment))
        except BaseException as error:
            undo_all = self._detach if prepared else self._down
            try:
                undo_all(request.pod_id)
            except TeardownFailed as undo:
                error.add_note(f"and undoing it failed: {undo}")
                log.warning("after pod %s failed to attach: %s", request.pod_id, undo)
            raise
        return attachment

    def _plan(self, request: NetworkRequest) -> CachedAttachment:
        conf = self._readiness.conf()
        self._cni.check_installed(conf)
        return CachedAttachment(
            pod_id=request.pod_id,
            netns=str(self.netns_of(request.pod_id)),
            ifname=IFNAME,
            conf=conf,
            args=cni_args(request),
            capabilities=capability_args(request, self._pod_cidrs()),
        )

    def _describe(self, cached: CachedAttachment) -> Attachment:
        result = cached.result or Result()
        interfaces, routes = netns.run_in(Path(cached.netns), lambda: _read_and_join(result))
        if not result.ips:
            raise CniError(cached.conf.plugins[-1].type, "ADD", "its result names no IP address for the pod")
        dns = result.dns
        return Attachment(
            netns=cached.netns,
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
        self._cache.forget(pod_id)

    def _detach(self, pod_id: str, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._delete(pod_id, cancelled)
        self._cache.forget(pod_id)

    def _delete(self, pod_id: str, cancelled: Callable[[], bool] = lambda: False) -> Path:
        """DEL of each plug-in. Returns the path of the namespace. Raises TeardownFailed."""
        path = self.netns_of(pod_id)
        problems: Sequence[Exception] = ()
        try:
            cached = self._cache.load(pod_id)
            if cached is not None:
                path = Path(cached.netns)
                problems = self._cni.delete(cached, cancelled)
        except CacheUnreadable as error:
            log.error("%s; running CNI DEL with the current network configuration instead", error)
            self._delete_without_cache(pod_id)
        if problems:
            # the namespace stays for the next DEL, as some plug-ins find in it what they have to undo
            raise TeardownFailed(pod_id, problems)
        return path

    def _delete_without_cache(self, pod_id: str) -> None:
        """DEL with the current configuration and the pod id. Failures are only logged.

        Most plug-ins find what they hold by the pod id; portmap does nothing without its ports.
        """
        try:
            conf = self._readiness.conf()
        except NetworkNotReady as error:
            log.error("cannot run CNI DEL, addresses and rules of pod %s stay until GC: %s", pod_id, error)
            return
        cached = CachedAttachment(
            pod_id=pod_id,
            netns=str(self._netns_dir / pod_id),
            ifname=IFNAME,
            conf=conf,
            args=f"IgnoreUnknown=1;K8S_POD_INFRA_CONTAINER_ID={pod_id}",
            begun=len(conf.plugins),
        )
        for problem in self._cni.delete(cached):
            log.error("%s", problem)

    def _open_taps(self, pod_id: str, begin: int) -> tuple[int, ...]:
        cached = self._attached(pod_id)
        assert cached.attachment is not None
        wanted = cached.attachment.interfaces[begin:]
        return netns.run_in(Path(cached.netns), lambda: open_taps(wanted)) if wanted else ()

    def _attached(self, pod_id: str) -> CachedAttachment:
        cached = self._cache.load(pod_id)
        if cached is None or cached.attachment is None:
            raise TapError("(none)", "find", f"the network of pod {pod_id} is not up")
        return cached

    def _collect(self, valid: frozenset[str]) -> list[Exception]:
        try:
            conf = self._readiness.conf()
        except NetworkNotReady:
            return []
        # a pod that was started meanwhile is not a leftover
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
    """Read what the plug-ins created, and connect the first interface to its tap if that was prepared."""
    with open_netlink() as netlink:
        links = list_links(netlink)
        interfaces, routes = read_links(netlink, links, result)
        if interfaces[0].tap in links:
            join(netlink, links, interfaces[0])
    return interfaces, routes


def _with(cached: CachedAttachment, attachment: Attachment) -> CachedAttachment:
    return msgspec.structs.replace(cached, attachment=attachment)


def _pod_ips(result: Result, first: Interface) -> tuple[str, ...]:
    """Return the addresses of the first interface in the order of the result: the first is the pod's IP.

    An address whose interface the result does not name counts as the first interface's. Where the result has
    no addresses of that interface, those of the kernel are returned.
    """
    interfaces = result.interfaces or ()
    ips = [
        each.address
        for each in result.ips or ()
        if each.interface is None or interfaces[each.interface].name == first.name
    ]
    return tuple(str(ipaddress.ip_interface(cidr).ip) for cidr in ips or first.addresses)
