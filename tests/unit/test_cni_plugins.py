"""One plug-in run: every way in which it can go wrong ends soon and says what happened."""

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


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    write_fake(tmp_path, "lamp")
    return Plugins((tmp_path / "absent", tmp_path), timeout_s=10)


def conf(**fields: Any) -> bytes:
    return json.dumps({"cniVersion": "1.0.0", "name": "net", "type": "lamp", **fields}).encode()


def fail(plugins: Plugins, deed: str) -> CniError:
    with pytest.raises(CniError) as caught:
        plugins.run("lamp", "ADD", conf(on={"ADD": deed}), {})
    assert (caught.value.plugin, caught.value.verb) == ("lamp", "ADD")
    return caught.value


def test_variables_and_configuration_arrive(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNI_IFNAME", "of the daemon's own environment")
    printed = plugins.run("lamp", "ADD", conf(log=str(tmp_path / "log")), {"CNI_CONTAINERID": "p1"})
    assert json.loads(printed) == {"cniVersion": "1.0.0"}
    call = json.loads((tmp_path / "log").read_text())
    assert call["variables"] == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "p1",
        "CNI_PATH": f"{tmp_path / 'absent'}:{tmp_path}",
    }
    assert call["conf"]["name"] == "net"


def test_a_configuration_larger_than_a_pipe(plugins: Plugins) -> None:
    result = {"cniVersion": "1.0.0", "dns": {"options": ["o" * 300_000]}}
    assert json.loads(plugins.run("lamp", "ADD", conf(result=result), {})) == result


def test_an_error_result_keeps_its_fields(plugins: Plugins) -> None:
    error = fail(plugins, "fail")
    assert (error.code, error.message, error.details) == (103, "the lamp is dark", "no oil")
    assert error.stderr == "some words for the log"
    for part in ("lamp", "ADD", "103", "the lamp is dark", "no oil", "some words"):
        assert part in str(error)


def test_failing_with_rubbish(plugins: Plugins) -> None:
    error = fail(plugins, "rubbish-fail")
    assert error.code is None
    assert "exit status 2 without an error result" in str(error) and "index out of range" in str(error)


def test_killed_by_a_signal(plugins: Plugins) -> None:
    assert "killed by signal 11" in str(fail(plugins, "die"))


def test_too_much_output(plugins: Plugins) -> None:
    assert "more than 1048576 bytes" in str(fail(plugins, "flood"))


@pytest.mark.parametrize("deed", ["hang", "flood-errors"])
def test_a_plugin_that_does_not_end_is_killed_with_its_children(tmp_path: Path, deed: str) -> None:
    write_fake(tmp_path, "lamp")
    started = time.monotonic()
    error = fail(Plugins((tmp_path,), timeout_s=0.6), deed)
    assert "did not end within 0.6 s" in str(error)
    assert time.monotonic() - started < 3
    assert len(error.stderr) <= MAX_STDERR
    group = (tmp_path / "pid").read_text()
    with pytest.raises(ProcessLookupError):
        while True:  # the orphan's zombie is for init to reap
            os.killpg(int(group), 0)
            assert time.monotonic() - started < 5
            time.sleep(0.01)


def test_one_that_nobody_waits_for_is_killed(plugins: Plugins) -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    with pytest.raises(CniError, match="nobody waits"):
        plugins.run("lamp", "ADD", conf(on={"ADD": "hang"}), {}, cancelled.is_set)


def test_a_child_left_behind_does_not_hold_us_up(plugins: Plugins) -> None:
    started = time.monotonic()
    printed = plugins.run("lamp", "ADD", conf(on={"ADD": "leave-child"}), {})
    assert json.loads(printed) == {"cniVersion": "1.0.0"}
    assert time.monotonic() - started < 2


def test_a_missing_plugin_says_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not executable")
    for name in ("text", "nothing"):
        with pytest.raises(CniError, match=f"no such program in {tmp_path}.*containernetworking-plugins"):
            Plugins((tmp_path,)).run(name, "ADD", b"{}", {})


def test_what_is_no_program_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "bad").chmod(0o755)
    with pytest.raises(CniError, match="cannot be started"):
        Plugins((tmp_path,)).run("bad", "ADD", b"{}", {})
