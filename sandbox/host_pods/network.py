"""A pod's network namespace, for what the daemon itself does in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from network import netns
from sandbox.pod import Pod

T = TypeVar("T")


def run_in_network(pod: Pod, action: Callable[[], T]) -> T:
    """Run `action` in the pod's network namespace, or in the node's that it shares. Blocking."""
    network = pod.record.network
    return action() if network is None else netns.run_in(Path(network.netns), action)
