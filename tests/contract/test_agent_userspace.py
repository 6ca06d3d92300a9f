"""User namespaces: ids inside and outside, capabilities, mounts, and execs."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox.errors import GuestError
from sandbox.guest import guest_pb2 as pb
from tests.kit.agent import ALL_CAPS, Guest, process, standard_mounts

BASE, LENGTH = 100000, 65536
CAP_SYS_ADMIN, CAP_CHOWN = 1 << 21, 1


def ranges(*each: tuple[int, int, int]) -> dict[str, Any]:
    made = [pb.IdRange(inside=inside, outside=outside, length=length) for inside, outside, length in each]
    return {"uid_ranges": made, "gid_ranges": made}


def mapped(script: str, **more: Any) -> pb.Process:
    return process(["sh", "-c", script], **ranges((0, BASE, LENGTH)), **more)


async def run(guest: Guest, script: str, *, start: dict[str, Any] | None = None, **more: Any) -> list[str]:
    _, lines = await guest.run([], process=mapped(script, **more), **(start or {}))
    return lines


async def test_ids_are_mapped(guest: Guest) -> None:
    lines = await run(guest, "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -g")
    assert [line.split() for line in lines] == [["0", str(BASE), str(LENGTH)]] * 2 + [["0"], ["0"]]


async def test_files_it_makes_belong_to_the_outer_id(guest: Guest) -> None:
    guest.agent.run_inside("mount", "-t", "tmpfs", "-o", "mode=1777", "volume", "/mnt")
    mount = pb.Mount(source="/mnt", target="/data", flags=0x1000, make=pb.Mount.DIRECTORY)
    mounts = {"mounts": [*standard_mounts(), mount]}
    await run(guest, "echo x >/data/file", start=mounts, uid=5, gid=6)
    owner = guest.agent.run_inside("stat", "-c", "%u %g", "/mnt/file").split()
    assert owner == [str(BASE + 5), str(BASE + 6)]


async def test_root_inside_has_no_privileges_outside(guest: Guest) -> None:
    everything: dict[str, Any] = {
        "cap_permitted": ALL_CAPS,
        "cap_effective": ALL_CAPS,
        "cap_bounding": ALL_CAPS,
    }
    script = "echo x >/etc/secret || echo denied; mount -t tmpfs none /tmp && echo mounted; cat /etc/secret"
    lines = await run(guest, script, **everything)
    assert "denied" in lines
    assert "mounted" in lines, "its mount namespace belongs to its user namespace"
    assert "of the image" in lines


async def test_capabilities_are_as_requested(guest: Guest) -> None:
    caps: dict[str, Any] = {"cap_permitted": CAP_CHOWN, "cap_effective": CAP_CHOWN, "cap_bounding": CAP_CHOWN}
    lines = await run(guest, "grep Cap /proc/self/status; mount -t tmpfs none /tmp || echo denied", **caps)
    found = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == CAP_CHOWN
    assert "denied" in lines


async def test_files_devices_and_terminal_belong_to_its_ids(guest: Guest) -> None:
    """Also its working directory, which the agent makes."""
    files = [pb.File(path="/etc/hosts", content=b"hosts\n", mode=0o644)]
    script = "ls -lnd /etc/hosts /dev/null /made | while read a b u g rest; do echo $u $g; done"
    lines = await run(guest, script, start={"files": files}, cwd="/made", make_cwd=True)
    assert lines == ["0 0"] * 3
    assert await run(guest, "stat -c %u $(tty)", tty=True, uid=7) == ["7"]


async def test_output_pipe_can_be_opened_again(guest: Guest) -> None:
    assert await run(guest, "echo again >/dev/stdout", uid=9) == ["again"]


async def test_exec_enters_the_containers_user_namespace(guest: Guest) -> None:
    id = await guest.start([], process=mapped("exec sleep 100"))
    script = ["sh", "-c", "cat /proc/self/uid_map; id -u; echo $PWD"]
    code, out, _ = await guest.exec(id, script, uid=3, **ranges((0, BASE, LENGTH)))
    assert (code, out.split()) == (0, ["0", str(BASE), str(LENGTH), "3", "/"])


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        (ranges((0, BASE, 10), (5, BASE, 10)), "user namespace"),
        (ranges((0, BASE, 0)), "user namespace"),
        (ranges((0, BASE, 10)) | {"uid": 77}, "setuid"),
        (ranges(*((n, BASE + n, 1) for n in range(400))), "user namespace"),
    ],
)
async def test_id_ranges_that_the_kernel_refuses_fail_the_start(
    guest: Guest, fields: dict[str, Any], step: str
) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start([], process=process(["true"], **fields))
    assert caught.value.step == step
