"""virtiofsd is found, its implementation detected, and started on a socket without a name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.errors import MissingProgram
from sandbox.host import process
from sandbox.vmm import virtiofsd
from sandbox.vmm.virtiofsd import Implementation, Prober, Share, Virtiofsd


def program(directory: Path, line: str) -> str:
    path = directory / "virtiofsd"
    path.write_text(f"#!/bin/sh\necho '{line}'\necho run >>{directory}/runs\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("line", "implementation"),
    [
        ("virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", Implementation.C),
        ("virtiofsd 1.13.2", Implementation.RUST),
    ],
)
async def test_implementation_is_detected_by_the_version_line(
    tmp_path: Path, line: str, implementation: Implementation
) -> None:
    prober = Prober([str(tmp_path / "missing"), program(tmp_path, line)])
    found = await prober.find()
    assert (found.implementation, found.version) == (implementation, line)
    assert await prober.find() == found
    assert (tmp_path / "runs").read_text() == "run\n", "run once, until the program changes"


async def test_missing_program_is_reported_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(MissingProgram, match="virtiofsd") as caught:
        await Prober([str(tmp_path / "missing")]).find()
    assert "apt-get install" in caught.value.package


@pytest.mark.parametrize("implementation", list(Implementation))
@pytest.mark.parametrize("cache", ["always", "auto", "none"])
def test_both_implementations_get_the_same_options(implementation: Implementation, cache: str) -> None:
    daemon = Virtiofsd(path="/x/virtiofsd", implementation=implementation, version="")
    argv = virtiofsd.plan_virtiofsd(daemon, Share(source="/pod/share", cache=cache), 7)
    text = " ".join(argv)
    assert argv[0] == "/x/virtiofsd"
    never = implementation is Implementation.RUST and cache == "none"
    for expected in ("--fd=7", f"cache={'never' if never else cache}", "sandbox=namespace", "xattr"):
        assert expected in text
    announced = (
        "announce_submounts" if implementation is Implementation.C else "--announce-submounts"
    ) in argv
    assert announced == (cache == "auto"), "only where the host mounts things while the guest runs"
    assert "/pod/share" in text
    assert "xattrmap=:map:trusted.:user.virtiofs.:" in text
    assert "modcaps" not in text, "no capability beyond its default ones"


async def test_started_program_exits_with_its_connection(tmp_path: Path) -> None:
    daemon = await Prober().find()
    share = tmp_path / "share"
    share.mkdir()
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    try:
        identity, connection = await virtiofsd.start_virtiofsd(
            daemon, Share(source=str(share), cache="auto"), at=tmp_path / "fs.sock", cgroups=(), log_fd=log
        )
    finally:
        os.close(log)
    try:
        assert not (tmp_path / "fs.sock").exists()
        assert process.alive(identity)
    finally:
        connection.close()
        # it exits when its only connection is closed
        await process.wait_exit(identity)
    assert process.find_by_argument(f"{tmp_path}/") == []
