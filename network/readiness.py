"""Whether the pods' network can be used: the configuration in force, looked at again as it changes.

`status` is called every few seconds and must not block: it looks at times of change and at whether
the plug-ins' programs are there. From CNI 1.1.0 on a plug-in can itself be asked (STATUS); that
takes a process, so it is asked in a thread beside, and `status` gives the latest answer.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from network.cni import Cni
from network.conf import NetworkConf, find_conf, list_files
from network.errors import CniError, NetworkError, NetworkNotReady
from network.spec import NetworkStatus
from sandbox.host import threads

ASK_AGAIN_S = 5.0

Stamp = tuple[tuple[str, int, int, int], ...]  # name, inode, time and size of each file
_NEVER = -1e9


class Readiness:
    def __init__(self, conf_dir: Path, cni: Cni) -> None:
        self._conf_dir = conf_dir
        self._cni = cni
        self._lock = threading.Lock()  # `conf` is called in worker threads, `status` on the loop
        self._stamp: Stamp | None = None
        self._found: NetworkConf | NetworkNotReady = NetworkNotReady("not looked at yet")
        self._asking = False
        self._asked: NetworkConf | None = None
        self._asked_at = _NEVER
        self._answer = ""

    def conf(self) -> NetworkConf:
        """The configuration in force. Raises NetworkNotReady."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                try:
                    self._found = find_conf(self._conf_dir)
                except NetworkNotReady as error:
                    self._found = error
                self._stamp = stamp
            found = self._found
        if isinstance(found, NetworkNotReady):
            raise NetworkNotReady(found.message, found.reason)
        return found

    def status(self) -> NetworkStatus:
        try:
            conf = self.conf()
            self._cni.check_installed(conf)
            self._consult(conf)
        except NetworkNotReady as error:
            return NetworkStatus(ready=False, reason=error.reason, message=error.message)
        except NetworkError as error:
            return NetworkStatus(ready=False, reason="NetworkPluginNotReady", message=str(error))
        return NetworkStatus(ready=True)

    def _stamp_now(self) -> Stamp:
        stamps = []
        for path in list_files(self._conf_dir):
            try:
                now = path.stat()
            except OSError:
                continue  # it went away meanwhile; the next look sees that
            stamps.append((path.name, now.st_ino, now.st_mtime_ns, now.st_size))
        return tuple(stamps)

    def _consult(self, conf: NetworkConf) -> None:
        """Raise what the plug-ins last answered to STATUS, and see to it that they are asked again."""
        if not conf.at_least("1.1.0"):
            return
        with self._lock:
            due = time.monotonic() - self._asked_at >= ASK_AGAIN_S or conf is not self._asked
            if due and not self._asking:
                self._asking = True
                threads.start(lambda: self._ask(conf), "husk-cni-status")
            if self._asked is not conf:
                raise NetworkNotReady(f"the plug-ins of {conf.file} were asked for their STATUS just now")
            if self._answer:
                raise NetworkNotReady(self._answer)

    def _ask(self, conf: NetworkConf) -> None:
        answer = ""
        try:
            self._cni.status(conf)
        except CniError as error:
            answer = str(error)
        finally:
            with self._lock:
                self._asking = False
                self._asked, self._answer, self._asked_at = conf, answer, time.monotonic()
