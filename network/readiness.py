"""Whether the pods' network can be used: the configuration in force, read again when its files change.

`status` is called every few seconds and must not block: it compares the files' inodes, times and sizes, and
checks that the plug-ins' programs exist. From CNI 1.1.0 on a plug-in can report its own STATUS; that takes a
process, so it runs in a thread at most every STATUS_INTERVAL_S, and `status` returns the latest outcome.
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

STATUS_INTERVAL_S = 5.0

Stamp = tuple[tuple[str, int, int, int], ...]  # name, inode, time and size of each file
_NEVER = -1e9


class Readiness:
    """The configuration in force and its status. `conf` may be called in any thread."""

    def __init__(self, conf_dir: Path, cni: Cni) -> None:
        self._conf_dir = conf_dir
        self._cni = cni
        self._lock = threading.Lock()  # `conf` is called in worker threads, `status` on the event loop
        self._stamp: Stamp | None = None
        self._found: NetworkConf | NetworkNotReady = NetworkNotReady("not read yet")
        self._checking = False
        self._checked: NetworkConf | None = None
        self._checked_at = _NEVER
        self._problem = ""

    def conf(self) -> NetworkConf:
        """Return the configuration in force, read again if a file has changed. Raises NetworkNotReady."""
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
        """Return whether a pod could be attached now, and why not. Does not block."""
        try:
            conf = self.conf()
            self._cni.check_installed(conf)
            self._check_plugins(conf)
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
                continue  # it was removed meanwhile, which the next call notices
            stamps.append((path.name, now.st_ino, now.st_mtime_ns, now.st_size))
        return tuple(stamps)

    def _check_plugins(self, conf: NetworkConf) -> None:
        """Start another STATUS if one is due, and raise NetworkNotReady with the outcome of the last one."""
        if not conf.at_least("1.1.0"):
            return
        with self._lock:
            due = time.monotonic() - self._checked_at >= STATUS_INTERVAL_S or conf is not self._checked
            if due and not self._checking:
                self._checking = True
                threads.start(lambda: self._run_status(conf), "husk-cni-status")
            if self._checked is not conf:
                raise NetworkNotReady(f"the STATUS of the plug-ins of {conf.file} is not known yet")
            if self._problem:
                raise NetworkNotReady(self._problem)

    def _run_status(self, conf: NetworkConf) -> None:
        problem = ""
        try:
            self._cni.status(conf)
        except CniError as error:
            problem = str(error)
        finally:
            with self._lock:
                self._checking = False
                self._checked, self._problem, self._checked_at = conf, problem, time.monotonic()
