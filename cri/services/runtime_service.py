"""The RuntimeService of the CRI, assembled from one file per subject."""

from __future__ import annotations

from cri.ports import Containers, Events, Networks, Node, Pods, StatsCollector, Streaming
from cri.proto import runtime_v1_pb2 as pb
from cri.server import Service
from cri.services.containers import ContainerCalls
from cri.services.events import EventCalls
from cri.services.node import NodeCalls
from cri.services.pods import PodCalls
from cri.services.sessions import StreamCalls
from cri.services.stats import StatsCalls
from sandbox.host.flights import Flights


def runtime_service(
    *,
    pods: Pods,
    containers: Containers,
    stats: StatsCollector,
    events: Events,
    networks: Networks,
    node: Node,
    flights: Flights,
    streaming: Streaming,
    version: str,
    layers_mountpoint: str,
) -> Service:
    """Return the service. `layers_mountpoint` is a path on the filesystem of the writable layers."""
    return Service(
        descriptor=pb.DESCRIPTOR.services_by_name["RuntimeService"],
        parts=(
            PodCalls(pods, node, flights),
            ContainerCalls(containers, flights),
            StatsCalls(pods, containers, stats, layers_mountpoint),
            EventCalls(events),
            StreamCalls(pods, containers, streaming),
            NodeCalls(node, networks, version),
        ),
    )
