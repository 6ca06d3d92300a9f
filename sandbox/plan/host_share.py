"""What a pod's VM may use of the host, from what the CRI says of its pod and containers. Pure.

For the host a VM is one: its threads run whatever the guest runs. So of CPUs and memory nodes it gets the
union of those that its containers name (the kubelet's CPU and memory managers name some for all containers of
a node, or for none), and the host's OOM killer sees it as it would see the most important of its containers.
"""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.plan.resources import DEFAULT_PERIOD_US, members
from sandbox.plan.values import HostShare
from sandbox.spec import Resources


def host_share(
    pod: Resources, overhead: Resources, containers: Sequence[Resources], *, whole: bool
) -> HostShare:
    """Return the share of a VM. `whole`: no client limits the cgroup above it, so the pod's weight and quota,
    with its overhead, are its VM's. Raises InvalidSpec for a list that is none."""
    limits = (pod, *containers)
    quota_us, period_us = _quota(pod, overhead)
    return HostShare(
        cpus=frozenset(number for each in limits for number in members(each.cpuset_cpus, "cpuset_cpus")),
        mems=frozenset(number for each in limits for number in members(each.cpuset_mems, "cpuset_mems")),
        oom_score_adj=min((each.oom_score_adj for each in containers), default=None),
        cpu_shares=_shares(pod, overhead, containers) if whole else 0,
        cpu_quota_us=quota_us if whole else 0,
        cpu_period_us=period_us if whole else 0,
    )


def _shares(pod: Resources, overhead: Resources, containers: Sequence[Resources]) -> int:
    shares = pod.cpu_shares or sum(each.cpu_shares for each in containers)
    return shares + overhead.cpu_shares if shares else 0


def _quota(pod: Resources, overhead: Resources) -> tuple[int, int]:
    """Return quota and period; zeros: no limit."""
    if pod.cpu_quota <= 0:
        return 0, 0
    period_us = pod.cpu_period or DEFAULT_PERIOD_US
    more = max(overhead.cpu_quota, 0) * period_us // (overhead.cpu_period or DEFAULT_PERIOD_US)
    return pod.cpu_quota + more, period_us
