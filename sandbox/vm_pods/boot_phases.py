"""The guest's part of a pod's start, on the host's clock. Pure, but for what it is given.

The agent tells moments of its own CLOCK_MONOTONIC, and what that clock says as it tells them. What
came before the pod was asked for (the boot of a VM that was made ahead) is not of its start. The
guest is not trusted: names, count and order are bounded, and nothing else can be wrong with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sandbox.guest import guest_pb2 as pb
from sandbox.records import Phase, Side

GUEST_PHASES_MAX = 16
FIRST_MOMENT = "kernel"  # what ends when the agent begins
_NAME = re.compile(r"[a-z][a-z-]{0,23}")


def guest_phases(
    welcome: pb.Welcome, *, received_s: float, began_s: float, vmm_started_s: float
) -> Iterator[Phase]:
    """Stretches between the agent's moments, in seconds since `began_s`; all arguments are moments of
    the host's monotonic clock."""
    if not welcome.now_ns:
        return
    zero_s = received_s - welcome.now_ns / 1e9 - began_s  # when the guest's clock began
    if zero_s < 0:
        return
    # what is in front of that: the VMM, its devices, the firmware, the first moments of the kernel
    started_s = max(vmm_started_s - began_s, 0.0)
    if started_s < zero_s:
        yield Phase(name="firmware", begin_s=started_s, end_s=zero_s, side=Side.GUEST)
    previous_ns = 0
    for number, moment in enumerate(welcome.phases[:GUEST_PHASES_MAX]):
        if not _NAME.fullmatch(moment.name) or not previous_ns <= moment.at_ns <= welcome.now_ns:
            return
        yield Phase(
            name=moment.name if number else FIRST_MOMENT,
            begin_s=zero_s + previous_ns / 1e9,
            end_s=zero_s + moment.at_ns / 1e9,
            side=Side.GUEST,
        )
        previous_ns = moment.at_ns
