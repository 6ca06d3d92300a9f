"""Every field that a request can carry is used, or refused by its path, or listed here with a reason.

The descriptors are traversed, so a new field of the CRI fails this test until its handling is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from cri.proto import runtime_v1_pb2 as pb
from cri.translate import container_spec, pod_spec, update_resources
from sandbox.errors import InvalidSpec

# -------------------------------------------------------------------------- fields without effect

UNUSED: Mapping[str, str] = {
    "RunPodSandboxRequest.config.linux.security_context.supplemental_groups_policy": (
        "a sandbox has no process whose groups could be merged"
    ),
    "CreateContainerRequest.pod_sandbox_id": "names the sandbox; passed on next to the spec",
    "CreateContainerRequest.sandbox_config": "repeats what RunPodSandbox got, which stays in force",
    "CreateContainerRequest.config.image.annotations": "hints for finding an image, which exists",
    "CreateContainerRequest.config.image.runtime_handler": "an image is the same for every handler",
    "CreateContainerRequest.config.image.image_ref": "set in responses: what `image` was resolved to",
    "CreateContainerRequest.config.mounts.image.annotations": "hints for finding an image, which exists",
    "CreateContainerRequest.config.mounts.image.runtime_handler": "an image is the same for every handler",
    "CreateContainerRequest.config.mounts.image.image_ref": "set in responses: what `image` was resolved to",
    "UpdateContainerResourcesRequest.container_id": "names the container; passed on next to the resources",
    "UpdateContainerResourcesRequest.annotations": "hints to runtimes that define some; Husk has none",
}

# ------------------------------------------------------------------------------ requests that pass

RESOURCES = {
    "cpuPeriod": 100000,
    "cpuQuota": 50000,
    "cpuShares": 512,
    "memoryLimitInBytes": 1 << 28,
    "oomScoreAdj": 7,
    "cpusetCpus": "0",
    "cpusetMems": "0",
    "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
    "unified": {"memory.high": "1"},
    "memorySwapLimitInBytes": 1 << 29,
}
IDS = [{"containerId": 0, "hostId": 1000, "length": 1000}]
USER_NAMESPACE = {"mode": "POD", "uids": IDS, "gids": IDS}
POD_SMALL = {"config": {"metadata": {"name": "n", "uid": "u", "namespace": "s"}}}
POD_RICH = {
    "config": {
        "metadata": {"name": "n", "uid": "u", "namespace": "s", "attempt": 1},
        "dnsConfig": {"servers": ["1.1.1.1"], "searches": ["a"], "options": ["b"]},
        "portMappings": [{"protocol": "TCP", "containerPort": 80, "hostPort": 8080, "hostIp": "1.2.3.4"}],
        "linux": {
            "resources": RESOURCES,
            "overhead": RESOURCES,
            "securityContext": {
                "runAsUser": {"value": 5},
                "runAsGroup": {"value": 6},
                "namespaceOptions": {"pid": "CONTAINER", "usernsOptions": USER_NAMESPACE},
                "seccomp": {"profileType": "Localhost", "localhostRef": "/profile"},
                "apparmor": {"profileType": "Localhost", "localhostRef": "profile"},
            },
        },
    }
}
CONTAINER_SMALL = {"podSandboxId": "p", "config": {"metadata": {"name": "c"}, "image": {"image": "i"}}}
CONTAINER_RICH = {
    "podSandboxId": "p",
    "sandboxConfig": POD_RICH["config"],
    "config": {
        "metadata": {"name": "c", "attempt": 1},
        "image": {"image": "i"},
        "envs": [{"key": "k", "value": "dg=="}],
        "mounts": [
            {
                "containerPath": "/c",
                "hostPath": "/h",
                "readonly": True,
                "uidMappings": IDS,
                "gidMappings": IDS,
            }
        ],
        "devices": [{"containerPath": "/dev/a", "hostPath": "/dev/b", "permissions": "r"}],
        "stopSignal": "SIGNAL_SIGUSR1",
        "linux": {
            "resources": RESOURCES,
            "securityContext": {
                "capabilities": {"addCapabilities": ["CHOWN"]},
                "runAsUser": {"value": 5},
                "runAsGroup": {"value": 6},
                "namespaceOptions": {"pid": "TARGET", "targetId": "t", "usernsOptions": USER_NAMESPACE},
                "seccomp": {"profileType": "Localhost", "localhostRef": "/profile"},
                "apparmor": {"profileType": "Localhost", "localhostRef": "profile"},
            },
        },
    },
}
CONTAINER_WITH_IMAGE_VOLUME = {
    "podSandboxId": "p",
    "config": {
        "metadata": {"name": "c"},
        "image": {"image": "i"},
        "mounts": [{"containerPath": "/c", "readonly": True, "image": {"image": "v"}}],
    },
}
UPDATE = {"containerId": "c", "linux": RESOURCES}

Translate = Callable[[Any], object]


class Request:
    def __init__(self, kind: type[Message], translate: Translate, *bases: Mapping[str, object]) -> None:
        self.kind = kind
        self.translate = translate
        self.bases = bases

    @property
    def name(self) -> str:
        return self.kind.DESCRIPTOR.name

    def base(self, content: Mapping[str, object]) -> Message:
        return ParseDict(dict(content), self.kind())


REQUESTS = (
    Request(
        pb.RunPodSandboxRequest,
        lambda request: pod_spec(request.config, request.runtime_handler),
        POD_RICH,
        POD_SMALL,
    ),
    Request(
        pb.CreateContainerRequest,
        lambda request: container_spec(request.config),
        CONTAINER_RICH,
        CONTAINER_WITH_IMAGE_VOLUME,
        CONTAINER_SMALL,
    ),
    Request(pb.UpdateContainerResourcesRequest, update_resources, UPDATE),
)

# -------------------------------------------------------------------------------- iterating fields

Path = tuple[FieldDescriptor, ...]


def is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def leaves(message: Any, above: Path = ()) -> Iterator[Path]:
    for field in message.fields:
        path = (*above, field)
        if field.message_type and not is_map(field) and field.message_type.fields:
            yield from leaves(field.message_type, path)
        else:
            yield path


def dotted(path: Path) -> str:
    return ".".join(field.name for field in path)


VALUES: Mapping[int, tuple[object, ...]] = {
    FieldDescriptor.TYPE_STRING: ("/other", "x", "w"),
    FieldDescriptor.TYPE_BYTES: (b"other",),
    FieldDescriptor.TYPE_BOOL: (True, False),
    FieldDescriptor.TYPE_DOUBLE: (0.5,),
}


def values(field: FieldDescriptor) -> tuple[object, ...]:
    if field.enum_type:
        return tuple(value.number for value in field.enum_type.values)
    return VALUES.get(field.type, (3, 77))


def put(message: Any, path: Path, value: object) -> None:
    """Set the field at the end of `path`, in the first item of every list on the way."""
    for field in path[:-1]:
        message = getattr(message, field.name)
        if field.is_repeated:
            message = message[0] if len(message) else message.add()
    last = path[-1]
    if is_map(last):
        getattr(message, last.name)["key"] = "other"
    elif last.message_type:
        getattr(message, last.name).SetInParent()
    elif last.is_repeated:
        getattr(message, last.name).append(value)
    else:
        setattr(message, last.name, value)


# --------------------------------------------------------------------------------------- fates


class Fate(StrEnum):
    USED = "used"
    REFUSED = "refused"
    UNHEARD = "unheard"


def plain(field: str) -> str:
    return field.replace("[0]", "").replace("[1]", "")


def names(error: InvalidSpec, path: str) -> bool:
    """The refusal is about this field, or about the whole part that it is in."""
    reported = plain(error.field)
    return path == reported or path.startswith(f"{reported}.")


def fate(request: Request, path: Path) -> Fate:
    where, refused = dotted(path), False
    for content in request.bases:
        before = request.translate(request.base(content))
        for value in values(path[-1]):
            message = request.base(content)
            put(message, path, value)
            try:
                if request.translate(message) != before:
                    return Fate.USED
            except InvalidSpec as error:
                refused = refused or names(error, where)
    return Fate.REFUSED if refused else Fate.UNHEARD


def excused(request: Request, path: Path) -> bool:
    full = f"{request.name}.{dotted(path)}"
    return any(full == known or full.startswith(f"{known}.") for known in UNUSED)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_every_field_is_used_refused_or_listed(request_: Request) -> None:
    unheard = [
        dotted(path)
        for path in leaves(request_.kind.DESCRIPTOR)
        if not excused(request_, path) and fate(request_, path) is Fate.UNHEARD
    ]
    assert unheard == []


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_listed_fields_exist_and_are_unused(request_: Request) -> None:
    """An excuse for a field that is gone, or is used by now, would hide the next mistake."""
    paths = {f"{request_.name}.{dotted(path)}": path for path in leaves(request_.kind.DESCRIPTOR)}
    for known in (known for known in UNUSED if known.startswith(f"{request_.name}.")):
        below = [path for full, path in paths.items() if full == known or full.startswith(f"{known}.")]
        assert below, f"{known} is not a field"
        assert all(fate(request_, path) is Fate.UNHEARD for path in below), f"{known} is heard"


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_every_request_is_traversed_completely(request_: Request) -> None:
    counts = {
        "RunPodSandboxRequest": 70,
        "CreateContainerRequest": 167,
        "UpdateContainerResourcesRequest": 20,
    }
    assert len(list(leaves(request_.kind.DESCRIPTOR))) == counts[request_.name]
