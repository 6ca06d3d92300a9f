"""The daemon's connections to the VM of one pod: the hypervisor's, and the agent's.

They end with the daemon, and the next one makes them again by the pod's record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sandbox.errors import GuestUnreachable
from sandbox.guest import guest_pb2 as pb
from sandbox.guest.client import GuestClient
from sandbox.pod import Pod
from sandbox.records import PodState
from sandbox.vmm import Machine

# More than a loaded, emulated guest needs to answer, and less than clients wait for a dead one.
GUEST_CALL_TIMEOUT_S = 60.0


class VmLink:
    """Connections to a pod's VM.

    `machine` is None before the VM was started and after `close`, `client` also while the connection to the
    agent is being made again; `connected` is set while there is a client. `on_event` gets the guest's events,
    in the order in which the guest sent them.
    """

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self.machine: Machine | None = None
        self.client: GuestClient | None = None
        self.connected = asyncio.Event()
        self.on_event: Callable[[Pod, pb.Event], None] | None = None
        self.settled = True  # False while containers are settled by a Welcome: their ends wait for their logs

    @property
    def compatible(self) -> GuestClient | None:
        """The connection to the agent, if every request can be made on it."""
        return None if self.client is None or self.client.foreign else self.client

    def handle_event(self, event: pb.Event) -> None:
        """Pass an event of the guest on."""
        if self.on_event is not None:
            self.on_event(self._pod, event)

    def console(self) -> str:
        """Return the last lines of the guest's console; empty without a VM."""
        return self.machine.console_tail() if self.machine else ""

    async def call(self, request: pb.Request, timeout_s: float = GUEST_CALL_TIMEOUT_S) -> pb.Reply:
        """Send a request to the agent and return its reply. Waits for a connection that is being made again.

        Raises GuestError, GuestUnreachable, DeadlineExceeded.
        """
        return await (await self.guest(timeout_s)).call(request, timeout_s)

    async def guest(self, timeout_s: float = GUEST_CALL_TIMEOUT_S) -> GuestClient:
        """Return the connection to the agent, once there is one. Raises GuestUnreachable."""
        record = self._pod.record
        if self.client is None and record.state is PodState.NOT_READY:
            raise self._unreachable()
        if self.client is None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.connected.wait()
            except TimeoutError:
                raise GuestUnreachable(f"pod {record.id}: no connection to its agent") from None
        if self.client is None:
            raise self._unreachable()
        return self.client

    def _unreachable(self) -> GuestUnreachable:
        record = self._pod.record
        return GuestUnreachable(f"pod {record.id}: {record.problem or 'its VM has ended'}")

    def fail(self) -> None:
        """Fail all calls, those in flight included, once the VM has ended; the pod's record says why."""
        if self.client is not None:
            self.client.fail(self._unreachable())
        self.client = None
        self.connected.set()  # wakes those that wait for a new connection
        self.connected.clear()

    def lose_client(self) -> None:
        """Forget a connection to the agent that was lost."""
        self.client = None
        self.connected.clear()

    async def close(self) -> None:
        """Close the connections to agent and VM, which run on. Idempotent; both can be made again."""
        client, self.client = self.client, None
        machine, self.machine = self.machine, None
        self.connected.clear()
        if client is not None:
            await client.close()
        if machine is not None:
            await machine.close()


def link_of(pod: Pod) -> VmLink:
    """Return the link to the pod's VM; the first call makes it, unconnected."""
    if pod.link is None:
        pod.link = VmLink(pod)
    assert isinstance(pod.link, VmLink), "the engine of VMs is given pods in VMs alone"
    return pod.link
