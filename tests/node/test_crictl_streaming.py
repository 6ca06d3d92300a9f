"""crictl exec, attach and port-forward, over both of its transports, on the real daemon."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import Site
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.node.conftest import Crictl, Running

pytestmark = pytest.mark.node

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Running:
    crictl.run("pull", WEB)
    crictl.run("pull", BUSYBOX)
    return crictl.start("streams", "httpd", WEB, [])


@pytest.fixture(params=["spdy", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Terminal:
    """A program on a new pseudo-terminal."""

    def __init__(self, argv: list[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, wanted: str) -> str:
        end = time.monotonic() + TIMEOUT_S
        while wanted not in self.seen:
            assert time.monotonic() < end, f"{wanted!r} did not come: {self.seen!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                self.seen += os.read(self._master, 4096).decode(errors="replace")
        return self.seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(crictl: Crictl, *words: str) -> Iterator[Terminal]:
    made = Terminal(crictl.command(*words))
    try:
        yield made
    finally:
        made.close()


def test_exec_output_and_exit_code_arrive(crictl: Crictl, pod: Running, transport: str) -> None:
    script = "echo out; echo err >&2; exit 42"
    done = crictl.run("exec", "--transport", transport, pod.container, "sh", "-c", script, check=False)
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr
    assert "42" in done.stderr
    assert done.returncode != 0
    assert crictl.say("exec", "--transport", transport, pod.container, "echo", "fine") == "fine"


def test_exec_with_stdin_passes_its_end(crictl: Crictl, pod: Running, transport: str) -> None:
    """wc prints its count only after the end of stdin has reached it."""
    command = crictl.command("exec", "-i", "--transport", transport, pod.container, "wc", "-c")
    data = bytes(300_000)
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, b"300000"), done.stderr


def test_exec_of_missing_program_fails(crictl: Crictl, pod: Running, transport: str) -> None:
    done = crictl.run("exec", "--transport", transport, pod.container, "no-such-program", check=False)
    assert done.returncode != 0
    assert "no-such-program" in done.stderr


def test_exec_with_terminal_is_interactive(crictl: Crictl, pod: Running, transport: str) -> None:
    with terminal(crictl, "exec", "-it", "--transport", transport, pod.container, "sh") as shell:
        shell.until("#")
        shell.type("tty; echo $((6 * 7))\n")
        assert "/dev/pts/" in shell.until("42")
        shell.type("exit\n")
        assert shell.process.wait(TIMEOUT_S) == 0


def test_exec_with_large_output_is_complete(crictl: Crictl, pod: Running, transport: str) -> None:
    command = crictl.command("exec", "--transport", transport, pod.container, "seq", "1", "300000")
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.stdout == b"".join(b"%d\n" % number for number in range(1, 300001)), done.stderr


def test_attach_with_stdin_reaches_the_first_process(crictl: Crictl, pod: Running, transport: str) -> None:
    script = "echo before; while read line; do echo got $line; done; echo bye"
    file = crictl.container_file(
        f"attach-{transport}", BUSYBOX, ["sh", "-c", script], stdin=True, stdin_once=True
    )
    container = crictl.say("create", pod.pod, file, pod.pod_file)
    crictl.run("start", container)
    eventually_sync(lambda: crictl.say("logs", container), until=lambda text: "before" in text, timeout_s=30)
    command = crictl.command("attach", "-i", "--transport", transport, container)
    done = subprocess.run(command, input=b"one\ntwo\n", capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, b"got one\ngot two\nbye\n"), done.stderr
    assert crictl.say("logs", container) == "before\ngot one\ngot two\nbye"


def test_attach_to_terminal_is_interactive(crictl: Crictl, pod: Running, transport: str) -> None:
    file = crictl.container_file(f"terminal-{transport}", BUSYBOX, ["sh"], stdin=True, tty=True)
    container = crictl.say("create", pod.pod, file, pod.pod_file)
    crictl.run("start", container)
    with terminal(crictl, "attach", "-it", "--transport", transport, container) as shell:
        shell.type("\n")
        shell.until("#")  # the shell's answer: it is attached
        shell.type("echo $((6 * 7))\n")
        shell.until("42")
        shell.type("exit\n")
        shell.process.wait(TIMEOUT_S)
    eventually_sync(
        lambda: crictl.json("inspect", container)["status"]["state"],
        until=lambda state: state == "CONTAINER_EXITED",
        timeout_s=30,
    )


@contextmanager
def forwarding(crictl: Crictl, pod: str, ports: str, transport: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        crictl.command("port-forward", "--transport", transport, pod, ports),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "Forwarding from" in process.stdout.readline()
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_port_forward_reaches_the_web_server(
    crictl: Crictl, site: Site, pod: Running, transport: str
) -> None:
    local = {"spdy": 18080, "websocket": 18081}[transport]
    with forwarding(crictl, pod.pod, f"{local}:80", transport):
        for _ in range(5):
            assert site.namespace.fetch("127.0.0.1", local) == "hello from the pod\n"


def test_port_forward_to_closed_port_reports_it(
    crictl: Crictl, site: Site, pod: Running, transport: str
) -> None:
    local = {"spdy": 18082, "websocket": 18083}[transport]
    with forwarding(crictl, pod.pod, f"{local}:81", transport) as process:
        with site.namespace.dial("127.0.0.1", local) as client:
            client.sendall(b"x")
            assert client.recv(10) == b""
        assert process.stdout is not None
        text = ""
        while "refused" not in text:
            line = process.stdout.readline()
            assert line, f"crictl gave no reason: {text}"
            text += line
    crictl.run("exec", pod.container, "true")
