"""The verbs of the Container Network Interface, over a whole list of plug-ins.

Follows the CNI specification 1.1.0 ("Section 3: Execution of Network Configurations") and its
predecessors to 0.3.0. Blocking: called in worker threads. Never two verbs at once for one pod, and
GC never beside ADD or DEL: `attach` sees to both.
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
    plugins: Plugins

    def check_installed(self, conf: NetworkConf) -> None:
        """Raises CniError for the first plug-in that is not there."""
        for plugin in conf.plugins:
            self.plugins.find(plugin.type)

    def add(
        self,
        held: CachedAttachment,
        save: Callable[[CachedAttachment], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> CachedAttachment:
        """ADD each plug-in, passing results along; each is `save`d as begun before it begins.

        Raises CniError; what was begun is then to be released with `delete`.
        """
        for number, plugin in enumerate(held.conf.plugins, 1):
            held = msgspec.structs.replace(held, begun=number)
            save(held)
            extra = self._prev_result(held)
            conf = execution_conf(held.conf, plugin, capabilities=held.capabilities, extra=extra)
            printed = self.plugins.run(plugin.type, "ADD", conf, _variables(held, held.netns), cancelled)
            held = msgspec.structs.replace(held, result=_understand(plugin, printed, held.conf.version))
        save(held)
        return held

    def delete(self, held: CachedAttachment, cancelled: Callable[[], bool] = lambda: False) -> list[CniError]:
        """DEL every plug-in that was begun, last first, whatever the others answer.

        A namespace that is gone is left out, as the specification asks: the plug-in then releases
        what it holds elsewhere.
        """
        path = held.netns if netns.is_namespace(Path(held.netns)) else ""
        # plug-ins were first told the result on DEL in 0.4.0
        extra = self._prev_result(held) if held.conf.at_least("0.4.0") else {}
        problems = []
        for plugin in reversed(held.conf.plugins[: held.begun]):
            conf = execution_conf(held.conf, plugin, capabilities=held.capabilities, extra=extra)
            try:
                self.plugins.run(plugin.type, "DEL", conf, _variables(held, path), cancelled)
            except CniError as error:
                problems.append(error)
        return problems

    def check(self, held: CachedAttachment) -> None:
        """CHECK that all is as ADD left it, where the version has it. Raises CniError."""
        if held.conf.disable_check or not held.conf.at_least("0.4.0"):
            return
        extra = self._prev_result(held)
        for plugin in held.conf.plugins:
            conf = execution_conf(held.conf, plugin, capabilities=held.capabilities, extra=extra)
            self.plugins.run(plugin.type, "CHECK", conf, _variables(held, held.netns))

    def status(self, conf: NetworkConf) -> None:
        """Ask each plug-in whether it can ADD, where the version has it. Raises CniError."""
        if conf.at_least("1.1.0"):
            for plugin in conf.plugins:
                self.plugins.run(plugin.type, "STATUS", execution_conf(conf, plugin), {})

    def collect(self, conf: NetworkConf, valid: Iterable[tuple[str, str]]) -> list[CniError]:
        """GC: tell each plug-in which (pod id, interface) exist; it releases what it holds for others."""
        if conf.disable_gc or not conf.at_least("1.1.0"):
            return []
        attachments = [_ValidAttachment(container_id=pod_id, ifname=ifname) for pod_id, ifname in valid]
        raw = msgspec.Raw(msgspec.json.encode(attachments))
        # the second name was in the published text by mistake, and plug-ins were written to it
        extra = {"cni.dev/valid-attachments": raw, "cni.dev/attachments": raw}
        problems = []
        for plugin in conf.plugins:
            try:
                self.plugins.run(plugin.type, "GC", execution_conf(conf, plugin, extra=extra), {})
            except CniError as error:
                problems.append(error)
        return problems

    def _prev_result(self, held: CachedAttachment) -> Mapping[str, msgspec.Raw]:
        if held.result is None:
            return {}
        return {PREV_RESULT: msgspec.Raw(render_result(held.result, held.conf.version))}


def _variables(held: CachedAttachment, path: str) -> dict[str, str]:
    return {
        "CNI_CONTAINERID": held.pod_id,
        "CNI_NETNS": path,
        "CNI_IFNAME": held.ifname,
        "CNI_ARGS": held.args,
    }


def _understand(plugin: Plugin, printed: bytes, version: str) -> Result:
    try:
        return parse_result(printed, version)
    except ValueError as error:
        start = printable(printed[:256])
        raise CniError(plugin.type, "ADD", f"it printed no valid result ({error}): {start!r}") from error
