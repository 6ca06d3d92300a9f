"""What Configure does to an agent's namespaces, and that the machine's stay as they are."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandbox.errors import DeadlineExceeded, GuestError
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.host.mount_flags import MS_BIND
from tests.kit.agent import TOKEN, Agent, Guest, build, standard_mounts
from tests.kit.scratch import scratch_dir

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")


@pytest.fixture
def agent() -> Iterator[Agent]:
    """A separate agent for each test, with two interfaces."""
    agent = Agent(build("husk-agent-asan"), scratch_dir("agent"))
    for number, mac in enumerate(MACS):
        agent.run_inside("ip", "link", "add", f"eth{number}", "type", "veth", "peer", "name", f"peer{number}")
        agent.run_inside("ip", "link", "set", f"eth{number}", "address", mac)
        agent.run_inside("ip", "link", "set", f"peer{number}", "up")
    yield agent
    assert agent.close() == 0, agent.stderr()


@pytest.fixture
async def guest(agent: Agent) -> AsyncIterator[Guest]:
    guest = Guest(agent)
    await guest.connect()
    yield guest
    await guest.close()


def configure(**more: object) -> pb.Configure:
    fields: dict[str, object] = {"hostname": "pod-1", "machine_id": "ab" * 16}
    return pb.Configure(**(fields | more))  # type: ignore[arg-type]


async def test_configure_sets_names_and_prepare_mounts_shm(agent: Agent, guest: Guest) -> None:
    host = socket.gethostname()
    assert not guest.client.welcome.configured
    for _ in range(2):  # a second time, as after a failure half-way
        await guest.call(prepare=pb.Prepare(shm_bytes=1 << 20))
    await guest.call(configure=configure(entropy=os.urandom(32)))
    assert (await guest.connect()).configured
    assert socket.gethostname() == host
    assert agent.run_inside("cat", "/proc/sys/kernel/hostname") == "pod-1\n"
    assert agent.run_inside("cat", "/run/husk/machine-id") == "ab" * 16 + "\n"
    assert agent.run_inside("stat", "-c", "%a", "/run/husk/shm") == "1777\n"
    shm = pb.Mount(source="/run/husk/shm", target="/dev/shm", flags=MS_BIND, make=pb.Mount.DIRECTORY)
    mounts = [*standard_mounts(), shm]
    assert (await guest.sh("echo shared >/dev/shm/x", mounts=mounts))[0] == 0
    assert await guest.sh("cat /dev/shm/x", mounts=mounts) == (0, ["shared"])
    assert not Path("/run/husk/shm/x").exists()


async def test_huge_page_directories_are_made_on_hugetlbfs(agent: Agent, guest: Guest) -> None:
    """In standalone mode the pool of pages is the machine's, and stays as it is."""
    wanted = [pb.HugeDirectory(name="a", mode=0o1770, uid=7, gid=8), pb.HugeDirectory(name="b", mode=0o700)]
    for directories in (wanted[:1], wanted):  # the second time one exists already
        await guest.call(huge_pages=pb.HugePages(count=4, directories=directories))
    assert agent.run_inside("stat", "-f", "-c", "%T %s", "/run/husk/huge") == "hugetlbfs 2097152\n"
    assert agent.run_inside("stat", "-c", "%a %u %g", "/run/husk/huge/a") == "1770 7 8\n"
    assert agent.run_inside("ls", "/run/husk/huge").split() == ["a", "b"]
    for name in ("", "..", "a/b", "x" * 256):
        with pytest.raises(GuestError, match="huge pages"):
            await guest.call(huge_pages=pb.HugePages(directories=[pb.HugeDirectory(name=name)]))


def addresses_of_the_machine() -> str:
    return subprocess.run(["ip", "-o", "addr"], check=True, capture_output=True, text=True).stdout


async def test_configure_sets_up_interfaces_and_routes(agent: Agent, guest: Guest) -> None:
    before = addresses_of_the_machine()
    request = configure(
        interfaces=[
            pb.Interface(mac=MACS[0], name="eth1", mtu=1400, addresses=["10.9.0.2/24", "fd00:9::2/64"]),
            pb.Interface(mac=MACS[1], name="eth0", addresses=["10.8.0.2/32"]),
        ],
        routes=[
            pb.Route(destination="0.0.0.0/0", gateway="10.9.0.1", interface="eth1", metric=50, mtu=1300),
            pb.Route(destination="10.7.0.0/16", interface="eth0"),
            pb.Route(destination="10.6.0.0/16", gateway="169.254.1.1", interface="eth0", on_link=True),
            pb.Route(destination="::/0", gateway="fd00:9::1", interface="eth1"),
        ],
        sysctls=[pb.Sysctl(path="net/ipv4/conf/eth1/forwarding", value="1")],
    )
    for _ in range(2):  # a second time, as after a failure half-way
        await guest.call(configure=request)
    links = agent.run_inside("ip", "-o", "link")
    assert f"{MACS[0]}" in next(line for line in links.splitlines() if ": eth1" in line)
    assert "mtu 1400" in next(line for line in links.splitlines() if ": eth1" in line)
    assert f"{MACS[1]}" in next(line for line in links.splitlines() if ": eth0" in line)
    addresses = agent.run_inside("ip", "-o", "addr")
    for address in ("127.0.0.1/8", "10.9.0.2/24", "fd00:9::2/64", "10.8.0.2/32"):
        assert f" {address} " in addresses
    assert "tentative" not in next(line for line in addresses.splitlines() if "fd00:9::2" in line)
    routes = agent.run_inside("ip", "route") + agent.run_inside("ip", "-6", "route")
    assert "default via 10.9.0.1 dev eth1 proto static metric 50 mtu 1300" in routes
    assert "10.7.0.0/16 dev eth0 proto static scope link" in routes
    assert "10.6.0.0/16 via 169.254.1.1 dev eth0 proto static onlink" in routes
    assert "default via fd00:9::1 dev eth1" in routes
    assert agent.run_inside("cat", "/proc/sys/net/ipv4/conf/eth1/forwarding") == "1\n"
    assert addresses_of_the_machine() == before


@pytest.mark.parametrize(
    ("more", "step"),
    [
        ({"interfaces": [pb.Interface(mac="invalid", name="x")]}, "interface invalid"),
        (
            {"interfaces": [pb.Interface(mac=MACS[0], name="eth0", addresses=["10.0.0.300/8"])]},
            "address 10.0.0.300/8",
        ),
        (
            {"routes": [pb.Route(destination="0.0.0.0/0", gateway="10.0.0.1", interface="no")]},
            "route 0.0.0.0/0",
        ),
        (
            {"routes": [pb.Route(destination="10.0.0.0/8", gateway="fd00::1", interface="lo")]},
            "route 10.0.0.0/8",
        ),
        ({"sysctls": [pb.Sysctl(path="net/no/such", value="1")]}, "sysctl net/no/such"),
        ({"sysctls": [pb.Sysctl(path="vm/swappiness", value="60")]}, "sysctl vm/swappiness"),
        ({"sysctls": [pb.Sysctl(path="net/../vm/swappiness", value="60")]}, "sysctl net/../vm/swappiness"),
        ({"hostname": "x" * 100}, "hostname"),
    ],
)
async def test_configure_that_failed_names_the_step_and_can_be_repeated(
    guest: Guest, more: dict[str, object], step: str
) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.call(configure=configure(**more))
    assert caught.value.step == step
    assert not (await guest.connect()).configured
    await guest.call(configure=configure())
    assert (await guest.connect()).configured


async def test_configure_leaves_the_machines_mounts_unchanged(agent: Agent, guest: Guest) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    await guest.call(configure=configure())
    await guest.run(["true"])
    assert Path("/proc/self/mountinfo").read_text() == mounts


async def test_namespaced_sysctls_are_set(agent: Agent, guest: Guest) -> None:
    sysctls = [
        pb.Sysctl(path="kernel/shm_rmid_forced", value="1"),
        pb.Sysctl(path="net/ipv4/ip_forward", value="1"),
    ]
    await guest.call(configure=configure(sysctls=sysctls))
    assert agent.run_inside("cat", "/proc/sys/net/ipv4/ip_forward") == "1\n"


async def test_nic_gets_the_mac_of_its_pod(agent: Agent, guest: Guest) -> None:
    """All clones of a template start with the same one."""
    own = "02:00:00:00:aa:01"
    nic = pb.Interface(mac=own, found_mac=MACS[0], name="eth7", addresses=["10.9.0.2/24"])
    await guest.call(configure=configure(interfaces=[nic]))
    (line,) = [each for each in agent.run_inside("ip", "-o", "link").splitlines() if ": eth7" in each]
    assert own in line and ",UP" in line


async def test_configure_with_a_multicast_mac_fails(guest: Guest) -> None:
    nic = pb.Interface(mac="01:00:00:00:00:01", found_mac=MACS[0], name="eth0")  # a multicast address
    with pytest.raises(GuestError, match="address 01:00:00:00:00:01 of interface"):
        await guest.call(configure=configure(interfaces=[nic]))


async def test_prepare_with_a_missing_share_names_it(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.call(prepare=pb.Prepare(shares=[pb.Share(tag="gone", path="/run/husk/gone")]))
    assert caught.value.step == "share gone"


async def test_template_adopts_a_new_token_after_the_snapshot_hello(agent: Agent) -> None:
    """The first connection to a clone brings a new token; the template's token is not valid any more."""
    address, first = f"unix:{agent.socket}", bytes(range(16))

    async def connect(token: bytes, epoch: int, *, snapshot: bool = False) -> GuestClient:
        return await GuestClient.connect(
            address, token=token, epoch=epoch, on_event=lambda event: None, timeout_s=5, snapshot=snapshot
        )

    template = await connect(TOKEN, 50, snapshot=True)
    await template.close()
    clone = await connect(first, 1)
    await clone.call(pb.Request(ping=pb.Ping()), 5)
    await clone.close()
    with pytest.raises(DeadlineExceeded):
        await GuestClient.connect(address, token=TOKEN, epoch=60, on_event=lambda event: None, timeout_s=1)
    again = await connect(first, 2)
    await again.close()


async def test_request_to_refresh_names_of_unknown_container_is_refused(guest: Guest) -> None:
    with pytest.raises(GuestError) as fault:
        await guest.call(refresh_names=pb.RefreshNames(container_id="absent", paths=["/data/sub"]))
    assert fault.value.errno == errno.ESRCH


async def test_request_to_refresh_a_missing_file_is_answered_at_once(guest: Guest) -> None:
    for path in ("", "/run/husk/volumes/absent", "x" * 5000):
        await guest.call(refresh_file=pb.RefreshFile(path=path))


async def test_request_to_release_inodes_is_answered_at_once_and_repeatable(guest: Guest) -> None:
    for _ in range(2):
        await guest.call(release_inodes=pb.ReleaseInodes())


@pytest.mark.parametrize("serial", ["none-with-this-number", "", "../vda", "x" * 4000])
async def test_disk_that_the_kernel_does_not_have_is_not_found(guest: Guest, serial: str) -> None:
    with pytest.raises(GuestError) as refused:
        await guest.client.call(pb.Request(find_disk=pb.FindDisk(serial=serial)), 10)
    assert refused.value.errno == errno.ENODEV
