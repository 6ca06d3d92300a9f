"""Container logs: the format, partial lines, terminals, rotation without a lost line."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.kit.cri import Cri, LogLine, Pod, parse_log
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
CUT = 16 * 1024
LINES = 100_000
ROTATIONS = 8
ROTATED_AT = 200_000  # bytes: of 4.5 million in all


def log_of(cri: Cri, pod: Pod, script: str, **fields: object) -> list[LogLine]:
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script], **fields)
    return parse_log(Path(cri.wait_exited(container).log_path))


def test_log_has_the_cri_format_at_its_path(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, ["sh", "-c", "echo to stdout; echo to stderr >&2"], name="speaker")
    status = cri.wait_exited(container)
    assert Path(status.log_path) == pod.log_directory / "speaker.log"
    lines = parse_log(Path(status.log_path))
    assert {(line.stream, line.tag, line.text) for line in lines} == {
        ("stdout", "F", "to stdout"),
        ("stderr", "F", "to stderr"),
    }
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|[+-]\d\d:\d\d)", line.time)


def test_last_line_without_newline_is_partial(cri: Cri, pod: Pod) -> None:
    lines = log_of(cri, pod, "echo whole; printf unended")
    assert [(line.tag, line.text) for line in lines] == [("F", "whole"), ("P", "unended")]


def test_long_line_is_cut(cri: Cri, pod: Pod) -> None:
    length = 40_000
    lines = log_of(cri, pod, f"head -c {length} /dev/zero | tr '\\0' x; echo; echo next")
    assert [line.tag for line in lines] == ["P", "P", "F", "F"]
    assert [len(line.text) for line in lines[:3]] == [CUT, CUT, length - 2 * CUT]
    assert lines[-1].text == "next"


def test_terminal_has_one_stream(cri: Cri, pod: Pod) -> None:
    lines = log_of(cri, pod, "test -t 0 && echo a terminal; echo to stderr >&2", tty=True)
    assert [(line.stream, line.text.rstrip("\r")) for line in lines] == [
        ("stdout", "a terminal"),
        ("stdout", "to stderr"),
    ]


def test_container_without_log_path_has_no_log(cri: Cri, pod: Pod) -> None:
    config = api.ContainerConfig(
        metadata=api.ContainerMetadata(name="silent"),
        image=api.ImageSpec(image=BUSYBOX),
        command=["sh", "-c", "echo unheard"],
    )
    answer = cri.call("CreateContainer", pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
    cri.start(answer.container_id)
    status = cri.wait_exited(answer.container_id)
    assert (status.exit_code, status.log_path) == (0, "")
    assert not (pod.log_directory / "silent.log").exists()


def test_rotation_loses_no_line(cri: Cri, pod: Pod) -> None:
    """As a kubelet does it: rename, then ReopenContainerLog, while the container keeps writing."""
    script = f"n=0; while [ $n -lt {LINES} ]; do n=$((n+1)); echo $n; done"
    container = cri.run(pod, BUSYBOX, ["sh", "-c", script])
    log = Path(cri.status(container).log_path)
    rotated = []
    for number in range(ROTATIONS):
        eventually_sync(lambda: log.stat().st_size, until=lambda size: size > ROTATED_AT, timeout_s=60)
        rotated.append(log.rename(log.with_suffix(f".{number}")))
        cri.call("ReopenContainerLog", container_id=container)
        assert log.exists()
    assert cri.status(container).state == api.CONTAINER_RUNNING, "it has to write while logs are rotated"
    sizes = [path.stat().st_size for path in rotated]
    cri.wait_exited(container, 120)
    assert [path.stat().st_size for path in rotated] == sizes, "a renamed file must not grow any more"
    texts = [line.text for path in (*rotated, log) for line in parse_log(path)]
    assert texts == [str(number) for number in range(1, LINES + 1)]


def test_reopen_of_a_stopped_container_is_refused(cri: Cri, pod: Pod) -> None:
    container = cri.run(pod, BUSYBOX, ["true"])
    log = Path(cri.wait_exited(container).log_path)
    log.unlink()
    with pytest.raises(grpc.RpcError):
        cri.call("ReopenContainerLog", container_id=container)
    assert not log.exists()
