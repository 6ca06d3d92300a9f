"""The phases of the Container Network Interface, each over the whole list of plug-ins.

    ADD      each plug-in in order, with the result of the one before (prevResult): attach a pod
    CHECK    each in order: is the attachment still as ADD left it?                     since 0.4.0
    DEL      each that ADD was started for, in reverse order, whatever the others return: release
    STATUS   each: could it ADD now?                                                    since 1.1.0
    GC       each: release what it holds for any attachment that is not listed          since 1.1.0

Follows the CNI SPEC 1.1.0 ("Section 3: Execution of Network Configurations") and its predecessors to 0.3.0.
Blocking: called in worker threads. The caller (`attach`) ensures what the SPEC demands: one phase at a time
for a pod, and no other phase while GC runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from network import netns
from network.attachment_cache import CachedAttachment
from network.conf import NetworkConf, Plugin, execution_conf
from network.errors import CniError
from network.plugins import Plugins, printable
from network.result import Result, parse_result, render_result

PREV_RESULT = "prevResult"


class _ValidAttachment(msgspec.Struct, frozen=True, kw_only=True):
    container_id: str = msgspec.field(name="containerID")
    ifname: str


@dataclass(frozen=True, slots=True)
class Cni:
    """Runs the phases. Holds no state: a pod's is in its CachedAttachment."""

    plugins: Plugins

    def check_installed(self, conf: NetworkConf) -> None:
        """Raise CniError for the first plug-in of the list whose program is missing."""
        for plugin in conf.plugins:
            self.plugins.find(plugin.type)

    def add(
        self,
        cached: CachedAttachment,
        save: Callable[[CachedAttachment], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> CachedAttachment:
        """ADD: run each plug-in with the result of the one before. Returns the state with the last result.

        `save` is called before each plug-in is started, with it counted as begun, and at the end. `cancelled`
        is polled, and kills the running plug-in when it returns true.
        Raises CniError; then the caller must release what was begun with `delete`.
        """
        for number, plugin in enumerate(cached.conf.plugins, 1):
            cached = msgspec.structs.replace(cached, begun=number)
            save(cached)
            extra = self._prev_result(cached)
            conf = execution_conf(cached.conf, plugin, capabilities=cached.capabilities, extra=extra)
            printed = self.plugins.run(plugin.type, "ADD", conf, _variables(cached, cached.netns), cancelled)
            cached = msgspec.structs.replace(cached, result=_parse(plugin, printed, cached.conf.version))
        save(cached)
        return cached

    def delete(
        self, cached: CachedAttachment, cancelled: Callable[[], bool] = lambda: False
    ) -> list[CniError]:
        """DEL: run every plug-in that was begun, last first, whatever the others return.

        Returns the failures. Without a namespace CNI_NETNS is empty, as the SPEC demands: a plug-in then
        releases what it holds elsewhere.
        """
        path = cached.netns if netns.is_namespace(Path(cached.netns)) else ""
        # DEL has a prevResult since 0.4.0
        extra = self._prev_result(cached) if cached.conf.at_least("0.4.0") else {}
        problems = []
        for plugin in reversed(cached.conf.plugins[: cached.begun]):
            conf = execution_conf(cached.conf, plugin, capabilities=cached.capabilities, extra=extra)
            try:
                self.plugins.run(plugin.type, "DEL", conf, _variables(cached, path), cancelled)
            except CniError as error:
                problems.append(error)
        return problems

    def check(self, cached: CachedAttachment) -> None:
        """CHECK: verify that all is as ADD left it. Does nothing before 0.4.0 or with disableCheck.

        Raises CniError.
        """
        if cached.conf.disable_check or not cached.conf.at_least("0.4.0"):
            return
        extra = self._prev_result(cached)
        for plugin in cached.conf.plugins:
            conf = execution_conf(cached.conf, plugin, capabilities=cached.capabilities, extra=extra)
            self.plugins.run(plugin.type, "CHECK", conf, _variables(cached, cached.netns))

    def status(self, conf: NetworkConf) -> None:
        """STATUS: verify that each plug-in could ADD. Does nothing before 1.1.0. Raises CniError."""
        if conf.at_least("1.1.0"):
            for plugin in conf.plugins:
                self.plugins.run(plugin.type, "STATUS", execution_conf(conf, plugin), {})

    def collect(self, conf: NetworkConf, valid: Iterable[tuple[str, str]]) -> list[CniError]:
        """GC: release what each plug-in holds for attachments other than `valid` (pod id, interface).

        Returns the failures. Does nothing before 1.1.0 or with disableGC.
        """
        if conf.disable_gc or not conf.at_least("1.1.0"):
            return []
        attachments = [_ValidAttachment(container_id=pod_id, ifname=ifname) for pod_id, ifname in valid]
        raw = msgspec.Raw(msgspec.json.encode(attachments))
        # the published text had the second name by mistake, and plug-ins were written to it
        extra = {"cni.dev/valid-attachments": raw, "cni.dev/attachments": raw}
        problems = []
        for plugin in conf.plugins:
            try:
                self.plugins.run(plugin.type, "GC", execution_conf(conf, plugin, extra=extra), {})
            except CniError as error:
                problems.append(error)
        return problems

    def _prev_result(self, cached: CachedAttachment) -> Mapping[str, msgspec.Raw]:
        if cached.result is None:
            return {}
        return {PREV_RESULT: msgspec.Raw(render_result(cached.result, cached.conf.version))}


def _variables(cached: CachedAttachment, path: str) -> dict[str, str]:
    return {
        "CNI_CONTAINERID": cached.pod_id,
        "CNI_NETNS": path,
        "CNI_IFNAME": cached.ifname,
        "CNI_ARGS": cached.args,
    }


def _parse(plugin: Plugin, printed: bytes, version: str) -> Result:
    try:
        return parse_result(printed, version)
    except ValueError as error:
        start = printable(printed[:256])
        raise CniError(plugin.type, "ADD", f"it printed an invalid result ({error}): {start!r}") from error
