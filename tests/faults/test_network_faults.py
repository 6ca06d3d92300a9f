"""After any failure nothing of the pod's network is left, and the error names the cause.

`Kills` stands in for `kill -9`: at one of the moments between two effects the work stops without any cleanup;
then another daemon, which knows only the pod's id, takes the pod down. Some moments are also tested with a
real SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from network import attach, netns, tap
from network.attach import Networks
from network.attachment_cache import AttachmentCache
from network.errors import CniError, NetnsError, NetworkError, TapError, TeardownFailed
from network.plugins import Plugins
from network.spec import PublishedPort
from sandbox.host import syscalls
from tests.fakes.cni.space import CLEAN, PLUGINS, PORTMAP, Space, bridge, in_space, make_request
from tests.kit.eventually import eventually, eventually_sync

PORTS = (PublishedPort(protocol="TCP", container_port=80, host_port=8080),)

# ------------------------------------------------------------------------------- plug-ins that fail


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("fail", "the fabric is down (code 103); no uplink; its stderr: a line for the log"),
        ("malformed", "it printed an invalid result"),
        ("malformed-fail", "exit status 2, and it printed no error result"),
        ("die", "killed by signal 11"),
        ("hang", "it did not exit within 1 s"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
@in_space
async def test_failed_add_leaves_nothing(space: Space, behaviour: str, words: str, when: str) -> None:
    """In a chain of bridge, portmap and one that fails; or the bridge itself, after its work is done."""
    space.add_fake("faulty")
    fails = {"type": "faulty", "on": {"ADD": behaviour}}
    if when == "before":
        space.configure(bridge(), PORTMAP, fails)
    else:
        space.configure({**bridge(), **fails, "real": str(PLUGINS / "bridge")}, PORTMAP)
    with pytest.raises(CniError) as caught:
        await space.networks(timeout_s=1).up(make_request(ports=PORTS))
    assert f"CNI plug-in faulty failed to ADD: {words}" in str(caught.value)
    assert space.census() == CLEAN


@in_space
async def test_interface_of_the_result_that_does_not_exist_fails(space: Space) -> None:
    space.add_fake("faulty")
    result = {"interfaces": [{"name": "eth7", "sandbox": "/ns"}]}
    space.configure(bridge(), {"type": "faulty", "result": result})
    with pytest.raises(TapError, match="eth7"):
        await space.networks().up(make_request())
    assert space.census() == CLEAN


@pytest.mark.parametrize("ips", [{}, {"ips": []}, {"ips": None}])
@in_space
async def test_result_without_an_address_is_refused_and_undone(space: Space, ips: dict[str, Any]) -> None:
    """The bridge has made an interface with an address, and its lease, but the last plug-in reports none."""
    space.add_fake("silent")
    result = {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/ns"}], **ips}
    space.configure(bridge(), {"type": "silent", "result": result})
    with pytest.raises(CniError, match="CNI plug-in silent failed to ADD: its result names no IP address"):
        await space.networks().up(make_request())
    assert space.census() == CLEAN


@in_space
async def test_missing_plugin_fails_before_any_effect(space: Space) -> None:
    space.configure(bridge(), {"type": "absent"})
    with pytest.raises(CniError, match=r"absent.*no such program"):
        await space.networks().up(make_request())
    assert not space.netns_dir.exists() and space.census() == CLEAN


@in_space
async def test_exhausted_address_range_fails_and_leaves_nothing(space: Space) -> None:
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.77.0.0/30"}]]}
    space.configure(bridge(ipam=ipam))
    networks = space.networks()
    await networks.up(make_request("first"))
    before = space.census()
    with pytest.raises(CniError, match="no IP addresses available"):
        await networks.up(make_request("second"))
    assert space.census() == before
    await networks.down("first")
    assert space.census() == CLEAN


@in_space
async def test_cancelled_start_is_undone_at_once(space: Space) -> None:
    space.add_fake("faulty")
    space.configure(bridge(), {"type": "faulty", "log": str(space.log), "on": {"ADD": "hang"}})
    task = asyncio.create_task(space.networks().up(make_request()))
    await eventually(space.calls)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5
    assert space.census() == CLEAN


@in_space
async def test_cache_that_cannot_be_written_fails_and_leaves_nothing(space: Space) -> None:
    space.configure(bridge())
    space.cache_dir.write_text("a file where the directory should be")
    with pytest.raises(OSError):
        await space.networks().up(make_request())
    space.cache_dir.unlink()
    assert space.census() == CLEAN


# -------------------------------------------------------------------------------------- taking down


@in_space
async def test_failed_del_can_be_repeated(space: Space) -> None:
    """The others get their DEL, and what the failed one needs is kept for the retry."""
    space.add_fake("faulty")
    failing = space.root / "failing"
    failing.touch()
    faulty = {"type": "faulty", "log": str(space.log), "on": {"DEL": "fail"}, "while": str(failing)}
    space.configure(bridge(ipMasq=True), faulty)
    networks = space.networks()
    await networks.up(make_request())
    for _ in range(2):
        with pytest.raises(TeardownFailed, match="faulty failed to DEL: the fabric is down") as caught:
            await networks.down("pod-1")
        assert [type(each) for each in caught.value.problems] == [CniError]
        left = space.census()
        assert (left["leases"], left["rules"]) == (frozenset(), frozenset())
        assert networks.list_leftovers() == ("pod-1",)
    failing.unlink()
    await space.networks().down("pod-1")
    assert space.census() == CLEAN
    assert [call["verb"] for call in space.calls()] == ["ADD", "DEL", "DEL", "DEL"]


@pytest.mark.parametrize("change", ["gone", "broken", "another"])
@in_space
async def test_configuration_changed_after_up_is_not_used_for_down(space: Space, change: str) -> None:
    path = space.configure(bridge(), PORTMAP)
    networks = space.networks()
    await networks.up(make_request(ports=PORTS))
    if change == "gone":
        path.unlink()
    elif change == "broken":
        path.write_text("{")
    else:
        space.configure({**bridge(), "type": "ptp"})
    await networks.down("pod-1")
    assert space.census() == CLEAN


@in_space
async def test_namespace_gone_before_down_still_releases_addresses(space: Space) -> None:
    """As after a reboot."""
    space.configure(bridge(), PORTMAP)
    networks = space.networks()
    attachment = await networks.up(make_request(ports=PORTS))
    netns.remove(Path(attachment.netns))
    with pytest.raises(NetnsError, match="enter"):
        await networks.open_taps("pod-1")
    await networks.down("pod-1")
    assert space.settled() == CLEAN


@in_space
async def test_regular_file_in_place_of_the_namespace_is_removed(space: Space) -> None:
    space.configure(bridge())
    networks = space.networks()
    path = Path((await networks.up(make_request())).netns)
    netns.remove(path)
    path.touch()
    await networks.down("pod-1")
    assert space.settled() == CLEAN


@in_space
async def test_unreadable_cache_does_not_block_down(space: Space) -> None:
    """DEL then uses the current configuration, and is left out where that is unusable too."""
    path = space.configure(bridge(ipMasq=True))
    networks = space.networks()
    cached = space.cache_dir / "pod-1.json"
    await networks.up(make_request())
    cached.write_text('{"pod_id":')
    await networks.down("pod-1")
    assert space.settled() == CLEAN
    await networks.up(make_request())
    cached.write_text('{"pod_id":')
    path.write_text("{")
    await networks.down("pod-1")
    assert {**space.settled(), "leases": frozenset(), "rules": frozenset()} == CLEAN


@in_space
async def test_down_of_an_unknown_pod_succeeds(space: Space) -> None:
    await space.networks().down("unknown")
    assert space.census() == CLEAN


# ----------------------------------------------------------------------------------------------- gc


@in_space
async def test_gc_releases_networks_of_unknown_pods(space: Space) -> None:
    space.add_fake("faulty")
    space.configure(bridge())
    networks = space.networks()
    for pod_id in ("kept", "lost"):
        await networks.up(make_request(pod_id))
    netns.make(space.netns_dir / "stray")
    await networks.gc(["kept"])
    assert networks.list_leftovers() == ("kept",)
    assert space.census()["leases"] == frozenset({"10.77.0.2", "fd77::2"})
    await networks.gc([])
    assert space.census() == CLEAN


@in_space
async def test_gc_continues_after_a_failure(space: Space) -> None:
    for name in ("bad", "good"):
        space.add_fake(name)
    log = {"log": str(space.log)}
    space.configure({"type": "bad", "on": {"GC": "fail"}, **log}, {"type": "good", **log}, version="1.1.0")
    await space.networks().gc([], ask_plugins=False)
    assert space.calls() == []
    with pytest.raises(TeardownFailed, match="bad failed to GC"):
        await space.networks().gc([])
    assert [(call["plugin"], call["verb"]) for call in space.calls()] == [("bad", "GC"), ("good", "GC")]


# ----------------------------------------------------------------------------------- killed anywhere


class Killed(BaseException):
    """The daemon was killed here: no handler catches this, and nothing is cleaned up."""


class Kills:
    """Counts the moments before each effect, and kills at one of them.

    What lies between two effects changes nothing, so "before the next" is "after this one" too.
    """

    EFFECTS: tuple[tuple[Any, str], ...] = (
        (AttachmentCache, "save"),
        (AttachmentCache, "forget"),
        (Plugins, "run"),
        (syscalls, "unshare"),
        (syscalls, "mount"),
        (syscalls, "umount2"),
        (syscalls, "setns"),
        (netns, "_bring_up_loopback"),
        (attach, "open_tap"),
        (tap, "_redirect"),
    )

    def __init__(self) -> None:
        self.at = -1
        self.moments = 0
        self.struck = False

    @contextmanager
    def armed(self, at: int) -> Iterator[None]:
        self.at, self.moments, self.struck = at, 0, False
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in self.EFFECTS:
                patch.setattr(owner, name, self._around(getattr(owner, name)))
            # a dead process undoes nothing
            for name in ("_down", "_detach"):
                undo = getattr(Networks, name)
                patch.setattr(Networks, name, lambda *a, undo=undo: None if self.struck else undo(*a))
            yield

    def _around(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._moment()
            return effect(*arguments, **named)

        return call

    def _moment(self) -> None:
        self.moments += 1
        if self.moments == self.at:
            self.struck = True
            raise Killed


async def start(networks: Networks) -> None:
    tap = await networks.prepare("pod-1")
    try:
        await networks.up(make_request(ports=PORTS))
        assert await networks.open_taps("pod-1", begin=1) == ()
    finally:
        os.close(tap)


async def moments_of(space: Space, verb: Callable[[Networks], Awaitable[None]], kills: Kills) -> int:
    with kills.armed(0):
        await verb(space.networks())
    return kills.moments


@in_space
async def test_kill_while_starting_leaves_nothing_after_down(space: Space) -> None:
    space.configure(bridge(), PORTMAP)
    kills = Kills()
    moments = await moments_of(space, start, kills)
    assert moments >= 14
    await space.networks().down("pod-1")
    for at in range(1, moments + 1):
        with kills.armed(at), pytest.raises(Killed):
            await start(space.networks())
        later = space.networks()
        anything = space.census() != CLEAN
        assert later.list_leftovers() == (("pod-1",) if anything else ())
        await later.down("pod-1")
        assert space.census() == CLEAN, f"killed at moment {at} of {moments}"
        await later.down("pod-1")


@in_space
async def test_kill_while_taking_down_leaves_nothing_after_down(space: Space) -> None:
    space.configure(bridge(), PORTMAP)
    kills = Kills()

    async def down(networks: Networks) -> None:
        await networks.down("pod-1")

    await start(space.networks())
    moments = await moments_of(space, down, kills)
    assert moments >= 4
    for at in range(1, moments + 1):
        await start(space.networks())
        with kills.armed(at), pytest.raises(Killed):
            await down(space.networks())
        await down(space.networks())
        assert space.census() == CLEAN, f"killed at moment {at} of {moments}"


DAEMON = """
import asyncio, json, sys
from pathlib import Path
from network.attach import Networks, NetworkRequest
directories = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()}
bins = (directories.pop("bin_dir"), Path("/usr/lib/cni"))
networks = Networks(bin_dirs=bins, **directories)
request = NetworkRequest(pod_id="pod-1", name="web", namespace="default", uid="u-1")
asyncio.run(networks.up(request))
"""


@pytest.mark.parametrize("behaviour", ["kill-daemon-before", "kill-daemon-after"])
@in_space
def test_sigkill_during_add_leaves_nothing_after_down(space: Space, behaviour: str) -> None:
    space.add_fake("faulty")
    space.configure(
        {**bridge(), "type": "faulty", "real": str(PLUGINS / "bridge"), "on": {"ADD": behaviour}}, PORTMAP
    )
    names = ("conf_dir", "bin_dir", "cache_dir", "netns_dir")
    directories = json.dumps({name: str(getattr(space, name)) for name in names})
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", DAEMON, directories], cwd=root, timeout=30)
    assert child.returncode == -signal.SIGKILL
    leased = behaviour == "kill-daemon-after"
    eventually_sync(lambda: (space.census()["leases"] != frozenset()) == leased)
    later = space.networks()
    assert later.list_leftovers() == ("pod-1",)
    asyncio.run(later.down("pod-1"))
    assert space.census() == CLEAN


def test_errors_have_one_base() -> None:
    for error in (CniError("p", "ADD", "m"), NetnsError("/p", "s", "x"), TapError("i", "s", "x")):
        assert isinstance(error, NetworkError)
