"""New network, IPC and mount namespaces, so that tests change nothing on the machine.

A sleeping process holds the namespaces; killing it releases them with everything that was made inside. Unix
sockets are reached by path from outside; for TCP, `dial` opens the socket inside.
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from sandbox.host import syscalls, threads

# /run has iptables' lock, named namespaces and run-time directories of other runtimes, /var/lib/cni the
# leases of host-local, /etc/cni its configuration: each namespace gets empty ones.
NAMESPACES = ("--net", "--ipc", "--mount")
SET_UP = """set -e
mount -t tmpfs -o mode=755 husk-test-run /run
mkdir -p /var/lib/cni /etc/cni /run/netns /run/lock
mount -t tmpfs -o mode=755 husk-test-cni /var/lib/cni
mount -t tmpfs -o mode=755 husk-test-cni /etc/cni
ip link set lo up
echo ready
exec sleep infinity
"""


class Namespace:
    """The namespaces of one test session. A context manager that releases them."""

    def __init__(self, mark: Path) -> None:
        # the shell does not use the argument after SET_UP; the leak check finds the process by it
        self._holder = subprocess.Popen(
            ["unshare", *NAMESPACES, "--propagation", "private", "sh", "-c", SET_UP, str(mark)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        answer = self._holder.stdout.readline()
        if answer != b"ready\n":
            self.close()
            raise RuntimeError("cannot make namespaces for network, IPC and mounts (root is needed)")

    @property
    def pid(self) -> int:
        return self._holder.pid

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the argv that runs `argv` inside. nsenter execs the program, so the pid is the program's."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *argv]

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60) -> str:
        """Run a program inside and return its standard output. Raises CalledProcessError, TimeoutExpired."""
        done = subprocess.run(
            self.command(argv), check=check, timeout=timeout_s, capture_output=True, text=True
        )
        return done.stdout

    def dial(self, host: str, port: int, timeout_s: float = 5) -> socket.socket:
        """Return a TCP connection made inside: a socket stays in the namespace of its creation.

        Raises OSError as connect(2) does.
        """
        return self._inside(lambda: socket.create_connection((host, port), timeout_s))

    def listen(self, host: str, port: int) -> socket.socket:
        """Return a listening TCP socket made inside."""
        return self._inside(lambda: socket.create_server((host, port)))

    def fetch(self, host: str, port: int, path: str = "/", timeout_s: float = 5) -> str:
        """Return the body of http://host:port/path, requested inside. Raises OSError, HTTPException."""
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        connection.sock = self.dial(host, port, timeout_s)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def _inside(self, action: Callable[[], socket.socket]) -> socket.socket:
        result: list[socket.socket] = []
        fault: list[BaseException] = []

        def work() -> None:
            # the thread ends with its task and does not return to its namespace
            try:
                enter_network(self.pid)
                result.append(action())
            except BaseException as caught:
                fault.append(caught)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if fault:
            raise fault[0]
        return result[0]

    def close(self) -> None:
        """Release the namespaces. Idempotent."""
        if self._holder.stdout is not None:
            self._holder.stdout.close()
        self._holder.kill()
        self._holder.wait()

    def __enter__(self) -> Namespace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def enter_network(pid: int) -> None:
    """Move the calling thread into the network of a process, for the rest of its life."""
    threads.enter_namespace(Path(f"/proc/{pid}/ns/net"), syscalls.CLONE_NEWNET)
