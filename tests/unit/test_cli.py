"""The command line: exit codes, what is printed where, and `husk image` against a daemon's socket."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri import __main__ as cli
from cri import config
from cri.cli.progress import Bars, Lines
from cri.interceptor import Interceptor
from cri.metrics import Metrics
from cri.proto import husk_v1_pb2 as pb
from cri.server import Server
from cri.services.image_service import image_service, transfer_service
from image.errors import RegistryUnavailable
from sandbox.host.flights import Flights
from tests.fakes.cri import IMAGE_ID, FakeImages


@pytest.fixture(autouse=True)
def _no_file_of_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "absent.toml")


class ImageDaemon:
    """A daemon that knows images only, on a loop in a thread: the command line's client is synchronous."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.images = FakeImages()
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        metrics, flights = Metrics("1"), Flights()
        services = (
            image_service(images=self.images, flights=flights, metrics=metrics, handlers=lambda: ("",)),
            transfer_service(images=self.images, metrics=metrics),
        )
        server = Server(self.socket, services, Interceptor(metrics))
        await server.start()
        self._ready.set()
        await self._end.wait()
        await server.stop(0)

    def __enter__(self) -> ImageDaemon:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ImageDaemon]:
    with ImageDaemon(tmp_path / "husk.sock") as daemon:
        yield daemon


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("husk ")


def test_the_configuration_in_force(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[metrics]\nport = 0\n")
    assert cli.main(["config", "--config", str(file), "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f'root = "{tmp_path}"' in out
    assert "port = 0" in out


@pytest.mark.parametrize("command", [["serve"], ["doctor"], ["config"], ["guest", "build"], ["image", "ls"]])
def test_a_broken_configuration_ends_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[log]\nlevle = 'info'\n")
    assert cli.main([*command, "--config", str(file)]) == 2
    assert f"husk: {file}: log.levle: unknown key, perhaps 'level' is meant" in capsys.readouterr().err


def test_wrong_usage_ends_with_2() -> None:
    both = ["guest", "build", "--kernel", "k", "--kernel-source"]
    for words in ([], ["image"], ["serve", "--nonsense"], ["image", "rm"], both):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2


def test_a_relative_path_means_the_current_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "--root", "state", "--socket", "s.sock"]) == 0
    out = capsys.readouterr().out
    assert f'root = "{tmp_path}/state"' in out
    assert f'socket = "{tmp_path}/s.sock"' in out


def test_without_a_daemon_it_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["image", "ls", "--socket", str(tmp_path / "none.sock")]) == 1
    assert "husk serve" in capsys.readouterr().err


def test_images_from_pull_to_remove(
    daemon: ImageDaemon, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--socket", str(daemon.socket)]
    assert cli.main(["image", "pull", "example.test/a:1", *where]) == 0
    done = capsys.readouterr()
    assert done.out == f"{IMAGE_ID} example.test/a:1\n"
    assert "download 222222222222" in done.err
    assert cli.main(["image", "import", str(tmp_path / "b.tar"), "--name", "b:2", *where]) == 0
    assert capsys.readouterr().out == f"{IMAGE_ID} b:2\n"
    assert cli.main(["image", "ls", *where]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["NAME", "IMAGE", "ID", "SIZE"]
    assert [line.split()[0] for line in table[1:]] == ["example.test/a:1", "b:2"]
    assert cli.main(["image", "rm", "b:2", "nobody", *where]) == 1, "one of them was not there"
    done = capsys.readouterr()
    assert (done.out, done.err) == (f"{IMAGE_ID}\n", "nobody: no such image\n")
    assert cli.main(["image", "ls", "--quiet", *where]) == 0
    assert capsys.readouterr().out == f"{IMAGE_ID}\n"


def test_a_password_comes_from_standard_input(
    daemon: ImageDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("secret\n"))
    words = ["image", "pull", "a:1", "--username", "me", "--password-stdin", "--socket", str(daemon.socket)]
    assert cli.main(words) == 0
    ((_, auth),) = daemon.images.pulls
    assert auth is not None and (auth.username, auth.password) == ("me", "secret")
    assert "secret" not in "".join(capsys.readouterr())


def test_what_the_daemon_refuses_is_told(daemon: ImageDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.images.failure = RegistryUnavailable("example.test", "GET manifest", "connection refused")
    assert cli.main(["image", "pull", "a:1", "--socket", str(daemon.socket)]) == 1
    assert "RegistryUnavailable: example.test" in capsys.readouterr().err


def test_the_command_is_a_program(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "cri", "doctor", "--json", "--root", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    assert {check["verdict"] for check in document["checks"]} <= {"ok", "warn", "fail"}


def test_a_second_daemon_on_the_same_socket_ends_with_1(daemon: ImageDaemon, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[metrics]\nport = 0\n[cni]\nconf_dir = "{tmp_path}/net.d"\n')
    stray = tmp_path / "r/run/pods" / ("0" * 64)
    stray.mkdir(parents=True)
    words = ["serve", "--config", str(file), "--root", str(tmp_path / "r"), "--socket", str(daemon.socket)]
    argv = [sys.executable, "-m", "cri", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "another daemon answers there" in done.stderr
    assert stray.is_dir()


def test_a_metrics_port_in_use_ends_with_2_before_anything_is_touched(tmp_path: Path) -> None:
    stray = tmp_path / "r/run/pods" / ("0" * 64)  # the sweep would remove what has no record
    stray.mkdir(parents=True)
    file = tmp_path / "config.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file.write_text(f'[metrics]\nport = {port}\n[cni]\nconf_dir = "{tmp_path}/net.d"\n')
        argv = [sys.executable, "-m", "cri", "serve", "--config", str(file), "--root", str(tmp_path / "r")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr and "metrics.port" in done.stderr
    assert stray.is_dir()


# ------------------------------------------------------------------------------------- progress

STEPS = (
    pb.Progress(item="sha256:" + "a" * 64, step="download", current=0, total=5_000_000),
    pb.Progress(item="sha256:" + "a" * 64, step="download", current=5_000_000, total=5_000_000),
    pb.Progress(item="sha256:" + "a" * 64, step="unpack", current=0, total=0),
)


def test_progress_in_plain_lines() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    for step in STEPS:
        lines.report(step)
        lines.report(step)
    assert stream.getvalue().splitlines() == [
        "download aaaaaaaaaaaa (5.0 MB)",
        "download aaaaaaaaaaaa: done",
        "unpack aaaaaaaaaaaa",
    ]


def test_progress_in_bars() -> None:
    stream = io.StringIO()
    with Bars(stream) as bars:
        for step in STEPS:
            bars.report(step)
    assert "download aaaaaaaaaaaa" in stream.getvalue()
    assert "5.0/5.0 MB" in stream.getvalue()
