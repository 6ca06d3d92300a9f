"""The RuntimeService of the CRI: one file per concern, put together here."""

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
    meter: StatsCollector,
    events: Events,
    networks: Networks,
    node: Node,
    flights: Flights,
    streaming: Streaming,
    version: str,
    layers_mountpoint: str,
) -> Service:
    """`layers_mountpoint` is a path on the filesystem of the containers' writable layers."""
    return Service(
        descriptor=pb.DESCRIPTOR.services_by_name["RuntimeService"],
        parts=(
            PodCalls(pods, node, flights),
            ContainerCalls(containers, flights),
            StatsCalls(pods, containers, meter, layers_mountpoint),
            EventCalls(events),
            StreamCalls(pods, containers, streaming),
            NodeCalls(node, networks, version),
        ),
    )
