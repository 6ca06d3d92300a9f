"""One run of a plug-in: every failure ends it soon and is reported with its cause."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from network.errors import CniError
from network.plugins import MAX_STDERR, Plugins
from tests.fakes.cni.space import write_fake
from tests.kit.eventually import eventually_sync


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    write_fake(tmp_path, "faulty")
    return Plugins((tmp_path / "absent", tmp_path), timeout_s=10)


def conf(**fields: Any) -> bytes:
    return json.dumps({"cniVersion": "1.0.0", "name": "net", "type": "faulty", **fields}).encode()


def fail(plugins: Plugins, behaviour: str) -> CniError:
    with pytest.raises(CniError) as caught:
        plugins.run("faulty", "ADD", conf(on={"ADD": behaviour}), {})
    assert (caught.value.plugin, caught.value.verb) == ("faulty", "ADD")
    return caught.value


def test_plugin_gets_variables_and_configuration(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNI_IFNAME", "of the daemon's own environment")
    printed = plugins.run("faulty", "ADD", conf(log=str(tmp_path / "log")), {"CNI_CONTAINERID": "p1"})
    assert json.loads(printed) == {"cniVersion": "1.0.0"}
    call = json.loads((tmp_path / "log").read_text())
    assert call["variables"] == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "p1",
        "CNI_PATH": f"{tmp_path / 'absent'}:{tmp_path}",
    }
    assert call["conf"]["name"] == "net"


def test_configuration_larger_than_a_pipe_is_passed(plugins: Plugins) -> None:
    result = {"cniVersion": "1.0.0", "dns": {"options": ["o" * 300_000]}}
    assert json.loads(plugins.run("faulty", "ADD", conf(result=result), {})) == result


def test_error_result_keeps_its_fields(plugins: Plugins) -> None:
    error = fail(plugins, "fail")
    assert (error.code, error.message, error.details) == (103, "the fabric is down", "no uplink")
    assert error.stderr == "a line for the log"
    for part in ("faulty", "ADD", "103", "the fabric is down", "no uplink", "a line for the log"):
        assert part in str(error)


@pytest.mark.parametrize(("code", "meaning"), [(7, "correct the file"), (11, "try again later"), (103, "")])
def test_reserved_error_code_is_explained(code: int, meaning: str) -> None:
    text = str(CniError("bridge", "ADD", "no", code=code))
    assert text.startswith(f"CNI plug-in bridge failed to ADD: no (code {code}")
    assert meaning in text


def test_failure_without_error_result_is_reported(plugins: Plugins) -> None:
    error = fail(plugins, "malformed-fail")
    assert error.code is None
    assert "exit status 2, and it printed no error result" in str(error) and "index out of range" in str(
        error
    )


def test_death_by_signal_is_reported(plugins: Plugins) -> None:
    assert "killed by signal 11" in str(fail(plugins, "die"))


def test_too_much_output_is_refused(plugins: Plugins) -> None:
    assert "more than 1048576 bytes" in str(fail(plugins, "flood"))


@pytest.mark.parametrize("behaviour", ["hang", "flood-errors"])
def test_plugin_that_does_not_exit_is_killed_with_its_children(tmp_path: Path, behaviour: str) -> None:
    write_fake(tmp_path, "faulty")
    started = time.monotonic()
    error = fail(Plugins((tmp_path,), timeout_s=0.6), behaviour)
    assert "did not exit within 0.6 s" in str(error)
    assert time.monotonic() - started < 3
    assert len(error.stderr) <= MAX_STDERR
    group = int((tmp_path / "pid").read_text())
    eventually_sync(lambda: is_gone(group), timeout_s=5, describe="init reaps the orphan")


def is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_plugin_of_a_cancelled_request_is_killed(plugins: Plugins) -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    with pytest.raises(CniError, match="request was cancelled"):
        plugins.run("faulty", "ADD", conf(on={"ADD": "hang"}), {}, cancelled.is_set)


def test_child_that_is_left_running_does_not_delay_the_result(plugins: Plugins) -> None:
    started = time.monotonic()
    printed = plugins.run("faulty", "ADD", conf(on={"ADD": "leave-child"}), {})
    assert json.loads(printed) == {"cniVersion": "1.0.0"}
    assert time.monotonic() - started < 2


def test_missing_plugin_is_reported_with_its_directories(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not executable")
    for name in ("text", "nothing"):
        with pytest.raises(CniError, match=f"no such program in {tmp_path}.*containernetworking-plugins"):
            Plugins((tmp_path,)).run(name, "ADD", b"{}", {})


def test_file_that_is_not_a_program_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "bad").chmod(0o755)
    with pytest.raises(CniError, match="cannot be started"):
        Plugins((tmp_path,)).run("bad", "ADD", b"{}", {})
