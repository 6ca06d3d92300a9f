"""Whatever goes wrong, when it is over nothing of the pod's network is left; and the error says why.

`Kills` stands in for `kill -9`: at one of the moments between two effects the work stops where it
is, with no clean-up; then another daemon, which knows nothing but the pod's id, takes the pod down.
Some moments are also tried with a real SIGKILL.
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
from network.spec import PortMapping
from tests.fakes.cni.space import CLEAN, PLUGINS, PORTMAP, Space, bridge, in_space, wish

PORTS = (PortMapping(protocol="TCP", container_port=80, host_port=8080),)

# ------------------------------------------------------------------------------- plug-ins that fail


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("fail", "the lamp is dark (code 103); no oil; it wrote: some words for the log"),
        ("rubbish", "it printed no valid result"),
        ("rubbish-fail", "exit status 2 without an error result"),
        ("die", "killed by signal 11"),
        ("hang", "it did not end within 1 s"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
@in_space
async def test_add_fails(space: Space, deed: str, words: str, when: str) -> None:
    """A chain of bridge, portmap and one that fails; or the bridge itself, once its work is done."""
    space.add_fake("lamp")
    fails = {"type": "lamp", "on": {"ADD": deed}}
    if when == "before":
        space.configure(bridge(), PORTMAP, fails)
    else:
        space.configure({**bridge(), **fails, "real": str(PLUGINS / "bridge")}, PORTMAP)
    with pytest.raises(CniError) as caught:
        await space.networks(timeout_s=1).up(wish(port_mappings=PORTS))
    assert f"CNI plug-in lamp failed to ADD: {words}" in str(caught.value)
    assert space.census() == CLEAN


@in_space
async def test_an_interface_that_was_promised_is_not_there(space: Space) -> None:
    space.add_fake("lamp")
    result = {"interfaces": [{"name": "eth7", "sandbox": "/ns"}]}
    space.configure(bridge(), {"type": "lamp", "result": result})
    with pytest.raises(TapError, match="eth7"):
        await space.networks().up(wish())
    assert space.census() == CLEAN


@in_space
async def test_a_missing_plugin_is_noticed_before_any_effect(space: Space) -> None:
    space.configure(bridge(), {"type": "absent"})
    with pytest.raises(CniError, match=r"absent.*no such program"):
        await space.networks().up(wish())
    assert not space.netns_dir.exists() and space.census() == CLEAN


@in_space
async def test_no_address_is_left_for_the_second_pod(space: Space) -> None:
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.77.0.0/30"}]]}
    space.configure(bridge(ipam=ipam))
    networks = space.networks()
    await networks.up(wish("first"))
    before = space.census()
    with pytest.raises(CniError, match="no IP addresses available"):
        await networks.up(wish("second"))
    assert space.census() == before
    await networks.down("first")
    assert space.census() == CLEAN


@in_space
async def test_a_cancelled_start_is_undone_at_once(space: Space) -> None:
    space.add_fake("lamp")
    space.configure(bridge(), {"type": "lamp", "log": str(space.log), "on": {"ADD": "hang"}})
    task = asyncio.create_task(space.networks().up(wish()))
    while not space.calls():
        await asyncio.sleep(0.01)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5
    assert space.census() == CLEAN


@in_space
async def test_no_room_for_the_held_file(space: Space) -> None:
    space.configure(bridge())
    space.cache_dir.write_text("a file where the directory should be")
    with pytest.raises(OSError):
        await space.networks().up(wish())
    space.cache_dir.unlink()
    assert space.census() == CLEAN


# -------------------------------------------------------------------------------------- taking down


@in_space
async def test_del_fails_then_works(space: Space) -> None:
    """The others get their DEL, and what the failed one needs is kept for the next try."""
    space.add_fake("lamp")
    stubborn = space.root / "stubborn"
    stubborn.touch()
    lamp = {"type": "lamp", "log": str(space.log), "on": {"DEL": "fail"}, "while": str(stubborn)}
    space.configure(bridge(ipMasq=True), lamp)
    networks = space.networks()
    await networks.up(wish())
    for _ in range(2):
        with pytest.raises(TeardownFailed, match="lamp failed to DEL: the lamp is dark") as caught:
            await networks.down("pod-1")
        assert [type(each) for each in caught.value.problems] == [CniError]
        left = space.census()
        assert (left["leases"], left["rules"]) == (frozenset(), frozenset())
        assert networks.list_leftovers() == ("pod-1",)
    stubborn.unlink()
    await space.networks().down("pod-1")
    assert space.census() == CLEAN
    assert [call["verb"] for call in space.calls()] == ["ADD", "DEL", "DEL", "DEL"]


@pytest.mark.parametrize("change", ["gone", "broken", "another"])
@in_space
async def test_the_configuration_changed_meanwhile(space: Space, change: str) -> None:
    path = space.configure(bridge(), PORTMAP)
    networks = space.networks()
    await networks.up(wish(port_mappings=PORTS))
    if change == "gone":
        path.unlink()
    elif change == "broken":
        path.write_text("{")
    else:
        space.configure({**bridge(), "type": "ptp"})
    await networks.down("pod-1")
    assert space.census() == CLEAN


@in_space
async def test_the_namespace_is_gone(space: Space) -> None:
    """As after a reboot: addresses are given back all the same."""
    space.configure(bridge(), PORTMAP)
    networks = space.networks()
    attachment = await networks.up(wish(port_mappings=PORTS))
    netns.remove(Path(attachment.netns))
    with pytest.raises(NetnsError, match="enter"):
        await networks.open_taps("pod-1")
    await networks.down("pod-1")
    assert space.settled() == CLEAN


@in_space
async def test_a_plain_file_in_the_namespaces_place(space: Space) -> None:
    space.configure(bridge())
    networks = space.networks()
    path = Path((await networks.up(wish())).netns)
    netns.remove(path)
    path.touch()
    await networks.down("pod-1")
    assert space.settled() == CLEAN


@in_space
async def test_a_damaged_held_file_blocks_nothing(space: Space) -> None:
    """Without it the plug-ins are told to DEL by the configuration of the day; without that, not at all."""
    path = space.configure(bridge(ipMasq=True))
    networks = space.networks()
    held = space.cache_dir / "pod-1.json"
    await networks.up(wish())
    held.write_text('{"pod_id":')
    await networks.down("pod-1")
    assert space.settled() == CLEAN
    await networks.up(wish())
    held.write_text('{"pod_id":')
    path.write_text("{")
    await networks.down("pod-1")
    assert {**space.settled(), "leases": frozenset(), "rules": frozenset()} == CLEAN


@in_space
async def test_down_of_what_never_was(space: Space) -> None:
    await space.networks().down("nobody")
    assert space.census() == CLEAN


# ----------------------------------------------------------------------------------------------- gc


@in_space
async def test_gc_releases_what_has_no_owner(space: Space) -> None:
    space.add_fake("lamp")
    space.configure(bridge())
    networks = space.networks()
    for pod_id in ("kept", "lost"):
        await networks.up(wish(pod_id))
    netns.make(space.netns_dir / "stray")
    await networks.gc(["kept"])
    assert networks.list_leftovers() == ("kept",)
    assert space.census()["leases"] == frozenset({"10.77.0.2", "fd77::2"})
    await networks.gc([])
    assert space.census() == CLEAN


@in_space
async def test_gc_goes_on_past_a_failure(space: Space) -> None:
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
    """The daemon was killed here: nobody catches this, and nothing is cleaned up."""


class Kills:
    """Counts the moments before each effect, and strikes at one of them.

    What lies between two effects changes nothing, so "before the next" is "after this one" too.
    """

    EFFECTS: tuple[tuple[Any, str], ...] = (
        (AttachmentCache, "save"),
        (AttachmentCache, "forget"),
        (Plugins, "run"),
        (netns, "_call"),
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
    held = await networks.prepare("pod-1")
    try:
        await networks.up(wish(port_mappings=PORTS))
        assert await networks.open_taps("pod-1", begin=1) == ()
    finally:
        os.close(held)


async def moments_of(space: Space, verb: Callable[[Networks], Awaitable[None]], kills: Kills) -> int:
    with kills.armed(0):
        await verb(space.networks())
    return kills.moments


@in_space
async def test_killed_while_starting(space: Space) -> None:
    space.configure(bridge(), PORTMAP)
    kills = Kills()
    moments = await moments_of(space, start, kills)
    assert moments >= 14
    await space.networks().down("pod-1")
    for at in range(1, moments + 1):
        with kills.armed(at), pytest.raises(Killed):
            await start(space.networks())
        later = space.networks()
        held = space.census() != CLEAN
        assert later.list_leftovers() == (("pod-1",) if held else ())
        await later.down("pod-1")
        assert space.census() == CLEAN, f"killed at moment {at} of {moments}"
        await later.down("pod-1")


@in_space
async def test_killed_while_taking_down(space: Space) -> None:
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
wish = NetworkRequest(pod_id="pod-1", name="web", namespace="default", uid="u-1")
asyncio.run(networks.up(wish))
"""


@pytest.mark.parametrize("deed", ["kill-daemon-before", "kill-daemon-after"])
@in_space
def test_really_killed(space: Space, deed: str) -> None:
    space.add_fake("lamp")
    space.configure(
        {**bridge(), "type": "lamp", "real": str(PLUGINS / "bridge"), "on": {"ADD": deed}}, PORTMAP
    )
    names = ("conf_dir", "bin_dir", "cache_dir", "netns_dir")
    directories = json.dumps({name: str(getattr(space, name)) for name in names})
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", DAEMON, directories], cwd=root, timeout=30)
    assert child.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while (space.census()["leases"] == frozenset()) == (deed == "kill-daemon-after"):
        assert time.monotonic() < deadline
    later = space.networks()
    assert later.list_leftovers() == ("pod-1",)
    asyncio.run(later.down("pod-1"))
    assert space.census() == CLEAN


def test_errors_share_a_root() -> None:
    for error in (CniError("p", "ADD", "m"), NetnsError("/p", "s", "x"), TapError("i", "s", "x")):
        assert isinstance(error, NetworkError)
