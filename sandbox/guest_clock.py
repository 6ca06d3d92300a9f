"""Whether the clock of a guest that has booted can be right.

A kernel measures its time stamp counter against a timer while it boots, three times, and believes the
lowest answer. Under emulation on a busy host the virtual CPU may stand still in the middle, and then all
clocks of the guest run several times too fast, as long as it lives; in a template, in each of its copies.
"""

from __future__ import annotations

from sandbox import process
from sandbox.errors import VmmError
from sandbox.guest.client import GuestClient
from sandbox.process import ProcessIdentity

SLACK_S = 0.1  # of which 10 ms are the host's, who tells starts in clock ticks


def check_clock(client: GuestClient, vmm: ProcessIdentity) -> None:
    """A guest that has counted more time than its VMM has lived counts wrongly. Raises VmmError."""
    counted_s = client.welcome.now_ns / 1e9
    lived_s = client.welcomed_s - process.started_s(vmm)
    if counted_s > lived_s + SLACK_S:
        raise VmmError(
            f"the guest's clock is wrong: it counts {counted_s:.1f} s of {lived_s:.1f} s since its start"
        )
