"""The command line: options, exit status, output, and `husk image` against a daemon's socket."""

from __future__ import annotations

import asyncio
import io
import json
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri import __main__ as cli
from cri import config, version
from cri.cli.progress import Bars, Lines
from cri.interceptor import Interceptor
from cri.metrics import Metrics
from cri.proto import husk_v1_pb2 as pb
from cri.proto import runtime_v1_pb2 as runtime
from cri.server import Server, Service
from cri.services.image_service import image_service, transfer_service
from image.blobs import Progress
from image.errors import RegistryUnavailable
from image.index import Image
from image.running import Transfer
from sandbox.guest import frames
from sandbox.host.flights import Flights
from tests.fakes.cri import IMAGE_ID, FakeImages


@pytest.fixture(autouse=True)
def _no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "absent.toml")


class _ImagesAside(FakeImages):
    """Images, of which some are set aside, each known by the name "old:1" too."""

    def __init__(self, set_aside: dict[str, str]) -> None:
        super().__init__()
        self._set_aside = set_aside

    async def remove(self, ref: str) -> Image | None:
        if ref == "old:1":
            self._set_aside.clear()
        self._set_aside.pop(ref, None)
        return await super().remove(ref)


class ImageDaemon:
    """A daemon that serves images only, on an event loop in a thread: the client is synchronous."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.set_aside: dict[str, str] = {}
        self.images = _ImagesAside(self.set_aside)
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def Status(self, request: runtime.StatusRequest) -> runtime.StatusResponse:
        """Return the images that are set aside, as the real Status does."""
        return runtime.StatusResponse(info={"quarantined": json.dumps({"image": self.set_aside})})

    async def _serve(self) -> None:
        metrics, flights = Metrics("1"), Flights()
        services = (
            image_service(images=self.images, flights=flights, metrics=metrics, handlers=lambda: ("",)),
            transfer_service(images=self.images, metrics=metrics),
            Service(runtime.DESCRIPTOR.services_by_name["RuntimeService"], (self,)),
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


def test_version_prints_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == [
        "husk",
        "commit",
        "python",
        "guest protocol",
        "cri",
    ]
    assert lines[2] == f"python {platform.python_version()}"


def test_version_as_json_has_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"version", "commit", "python", "guest_protocol", "cri"}
    assert facts["cri"] == "v1" and facts["guest_protocol"] == [frames.MIN_VERSION, frames.VERSION]


def test_commit_of_a_package_comes_from_the_file_that_its_build_wrote(tmp_path: Path) -> None:
    (tmp_path / "commit.txt").write_text("v0.1.0-3-gabcdef1\n")
    assert version.commit(tmp_path) == "v0.1.0-3-gabcdef1"


def test_commit_of_a_checkout_comes_from_git(tmp_path: Path) -> None:
    (tmp_path / "cri").mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.test"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"], ["tag", "v9"]):
        subprocess.run([*git, *words], check=True)
    assert version.commit(tmp_path / "cri") == "v9"


def test_commit_of_a_plain_directory_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "cri").mkdir()
    assert version.commit(tmp_path / "cri") == "unknown"
    (tmp_path / ".git").mkdir()  # a broken checkout: git fails
    assert version.commit(tmp_path / "cri") == "unknown"


@pytest.mark.parametrize("verb", [["config"], ["version"], ["doctor"], ["serve"], ["trace", "web"]])
def test_options_before_and_after_the_verb_mean_the_same(verb: list[str]) -> None:
    options = ["--config", "c.toml", "--root", "r", "--socket", "s"]
    for words in ([*options, *verb], [*verb, *options], [*options[:2], *verb, *options[2:]]):
        assert _daemon_options(words) == (Path("c.toml"), "r", "s")
    assert _daemon_options(verb) == (None, "", "")
    assert _daemon_options(["--root", "first", *verb, "--root", "second"]) == (None, "second", "")


@pytest.mark.parametrize(
    ("group", "verb"),
    [
        ("image", ["pull", "a:1"]),
        ("image", ["import", "a.tar"]),
        ("image", ["ls"]),
        ("image", ["rm", "a:1"]),
        ("guest", ["build"]),
    ],
)
def test_options_of_a_nested_verb_work_in_every_place(group: str, verb: list[str]) -> None:
    options = ["--config", "c.toml", "--root", "r", "--socket", "s"]
    for words in ([*options, group, *verb], [group, *options, *verb], [group, *verb, *options]):
        assert _daemon_options(words) == (Path("c.toml"), "r", "s")
    assert _daemon_options([group, *verb]) == (None, "", "")


def _daemon_options(words: list[str]) -> tuple[Path | None, str, str]:
    args = cli._parser().parse_args(words)
    return args.config, args.root, args.socket


def test_help_documents_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert "exit status:\n  0    success\n  1 " in capsys.readouterr().out


def test_config_prints_the_configuration_in_force(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[metrics]\nport = 0\n")
    assert cli.main(["config", "--config", str(file), "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f'root = "{tmp_path}"' in out
    assert "port = 0" in out


@pytest.mark.parametrize("command", [["serve"], ["doctor"], ["config"], ["guest", "build"], ["image", "ls"]])
def test_broken_configuration_exits_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[log]\nlevle = 'info'\n")
    assert cli.main([*command, "--config", str(file)]) == 2
    assert f"husk: {file}: log.levle: unknown key, did you mean 'level'?" in capsys.readouterr().err


def test_wrong_usage_exits_with_2() -> None:
    both = ["guest", "build", "--kernel-package", "k", "--kernel-source"]
    for words in ([], ["image"], ["serve", "--nonsense"], ["image", "rm"], both):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2


def test_relative_paths_are_resolved_against_the_current_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "--root", "state", "--socket", "s.sock"]) == 0
    out = capsys.readouterr().out
    assert f'root = "{tmp_path}/state"' in out
    assert f'socket = "{tmp_path}/s.sock"' in out


def test_image_without_a_daemon_names_the_command_that_starts_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["image", "ls", "--socket", str(tmp_path / "none.sock")]) == 1
    assert "husk serve" in capsys.readouterr().err


def test_image_pull_import_ls_and_rm(
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
    assert cli.main(["image", "rm", "b:2", "absent", *where]) == 1, "one of them does not exist"
    done = capsys.readouterr()
    assert (done.out, done.err) == (f"{IMAGE_ID}\n", "absent: no such image\n")
    assert cli.main(["image", "ls", "--quiet", *where]) == 0
    assert capsys.readouterr().out == f"{IMAGE_ID}\n"


@pytest.mark.parametrize("name", ["sha256:" + "5" * 64, "old:1"])
def test_image_ls_shows_what_was_set_aside_and_rm_removes_it(
    daemon: ImageDaemon, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    where = ["--socket", str(daemon.socket)]
    daemon.set_aside["sha256:" + "5" * 64] = "its User has 5000 characters"
    assert cli.main(["image", "ls", *where]) == 0
    shown = capsys.readouterr()
    assert "sha256:" + "5" * 64 in shown.err and "its User has 5000 characters" in shown.err
    assert cli.main(["image", "rm", name, *where]) == 0
    assert capsys.readouterr().out == "sha256:" + "5" * 64 + "\n"
    assert cli.main(["image", "rm", name, *where]) == 1


def test_image_ls_pulling_shows_how_far_each_pull_is(
    daemon: ImageDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer = Transfer("example.test/a:1")
    for digest, step, current in (
        ("a", "download", 1_000_000),
        ("b", "unpack", 2_000_000),
        ("c", "present", 1),
    ):
        transfer.count(Progress(item=digest, step=step, current=current, total=max(current, 2_000_000)))
    transfer.count(Progress(item="c", step="present", current=1, total=1))
    daemon.images.running = (transfer, Transfer("example.test/new:1"))
    assert cli.main(["image", "ls", "--pulling", "--socket", str(daemon.socket)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["NAME", "LAYERS", "RECEIVED", "OF", "SECONDS"]
    assert rows[1][:-1] == ["example.test/a:1", "2/3", "3.0", "MB", "4.0", "MB"]
    assert rows[2][:2] == ["example.test/new:1", "-"]


def test_pull_reads_the_password_from_standard_input(
    daemon: ImageDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("secret\n"))
    words = ["image", "pull", "a:1", "--username", "me", "--password-stdin", "--socket", str(daemon.socket)]
    assert cli.main(words) == 0
    ((_, auth),) = daemon.images.pulls
    assert auth is not None and (auth.username, auth.password) == ("me", "secret")
    assert "secret" not in "".join(capsys.readouterr())


def test_error_of_the_daemon_is_printed(daemon: ImageDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.images.failure = RegistryUnavailable("example.test", "GET manifest", "connection refused")
    assert cli.main(["image", "pull", "a:1", "--socket", str(daemon.socket)]) == 1
    assert "RegistryUnavailable: example.test" in capsys.readouterr().err


def test_doctor_as_a_process_prints_json_and_matching_exit_status(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"  # in place of the machine's
    file.touch()
    argv = [sys.executable, "-m", "cri", "doctor", "--json", "--config", str(file), "--root", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    assert {check["result"] for check in document["checks"]} <= {"ok", "warn", "fail"}


def make_plan_without_container(root: Path) -> Path:
    """Make a file that a daemon deletes when it starts."""
    plan = root / "containers" / f"{'0' * 64}.plan"
    plan.parent.mkdir(parents=True)
    plan.touch()
    return plan


def test_serve_on_a_socket_in_use_exits_with_1_and_changes_nothing(
    daemon: ImageDaemon, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[metrics]\nport = 0\n[cni]\nconf_dir = "{tmp_path}/net.d"\n')
    stray = make_plan_without_container(tmp_path / "r")
    words = ["serve", "--config", str(file), "--root", str(tmp_path / "r"), "--socket", str(daemon.socket)]
    argv = [sys.executable, "-m", "cri", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "another daemon answers there" in done.stderr
    assert stray.exists()


def test_serve_with_metrics_port_in_use_exits_with_2_and_changes_nothing(tmp_path: Path) -> None:
    stray = make_plan_without_container(tmp_path / "r")
    file = tmp_path / "config.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file.write_text(f'[metrics]\nport = {port}\n[cni]\nconf_dir = "{tmp_path}/net.d"\n')
        argv = [sys.executable, "-m", "cri", "serve", "--config", str(file), "--root", str(tmp_path / "r")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr and "metrics.port" in done.stderr
    assert stray.exists()


# ------------------------------------------------------------------------------------- progress

STEPS = (
    pb.Progress(item="sha256:" + "a" * 64, step="download", current=0, total=5_000_000),
    pb.Progress(item="sha256:" + "a" * 64, step="download", current=5_000_000, total=5_000_000),
    pb.Progress(item="sha256:" + "a" * 64, step="unpack", current=0, total=0),
)


def test_progress_to_a_file_is_a_line_per_begin_and_end() -> None:
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


def test_progress_on_a_terminal_is_bars() -> None:
    stream = io.StringIO()
    with Bars(stream) as bars:
        for step in STEPS:
            bars.report(step)
    assert "download aaaaaaaaaaaa" in stream.getvalue()
    assert "5.0/5.0 MB" in stream.getvalue()
