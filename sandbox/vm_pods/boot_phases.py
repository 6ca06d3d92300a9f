"""The phases of a guest's boot on the host's clock, for the waterfall of a pod's start. Pure.

The agent reports moments on its CLOCK_MONOTONIC, and the current value of that clock. A boot before
RunPodSandbox (that of a pooled VM) is not part of the pod's start. The guest is not trusted: names, number
and order of the moments are checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sandbox.guest import guest_pb2 as pb
from sandbox.records import Phase, Side

GUEST_PHASES_MAX = 16
FIRST_MOMENT = "kernel"  # name of the phase that ends when the agent starts
_NAME = re.compile(r"[a-z][a-z-]{0,23}")


def guest_phases(
    welcome: pb.Welcome, *, received_s: float, began_s: float, vmm_started_s: float
) -> Iterator[Phase]:
    """Yield the phases between the agent's moments, in seconds since `began_s`.

    All arguments are seconds of the host's monotonic clock: when the Welcome was received, when
    RunPodSandbox began, and when the VMM started. Ends at the first moment that is malformed or out of
    order; yields nothing for a guest that booted before `began_s`.
    """
    if not welcome.now_ns:
        return
    zero_s = received_s - welcome.now_ns / 1e9 - began_s  # when the guest's clock started
    if zero_s < 0:
        return
    # before that: the VMM, its devices, the firmware, the first instructions of the kernel
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
