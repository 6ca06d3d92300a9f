"""The ImageService of the CRI, and Husk's own service for `husk image`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cri.metrics import Metrics
from cri.ports import Images
from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb
from cri.server import Service
from cri.services.images import ImageCalls
from cri.services.transfers import TransferCalls
from sandbox.host.flights import Flights


def image_service(
    *, images: Images, flights: Flights, metrics: Metrics, handlers: Callable[[], Sequence[str]]
) -> Service:
    """Return the ImageService. `handlers` returns the names of the runtime handlers, "" among them."""
    return Service(
        descriptor=pb.DESCRIPTOR.services_by_name["ImageService"],
        parts=(ImageCalls(images, flights, metrics, handlers),),
    )


def transfer_service(*, images: Images, metrics: Metrics) -> Service:
    """Return husk.v1.Images."""
    return Service(
        descriptor=husk.DESCRIPTOR.services_by_name["Images"], parts=(TransferCalls(images, metrics),)
    )
