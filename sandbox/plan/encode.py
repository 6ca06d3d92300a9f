"""Plans as messages of guest.proto: field by field, by name. Pure.

A message has all the fields that its value has (tests/unit/test_encode.py); what else it has, such as the
streams of a log, belongs to the connection and is set by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

from msgspec import Struct

from sandbox.guest import guest_pb2 as pb
from sandbox.plan.values import (
    CgroupFile,
    ContainerPlan,
    HugeDirectory,
    IdentityPlan,
    NetworkPlan,
    ProcessPlan,
)


def encode_container(plan: ContainerPlan) -> pb.Start:
    """Return the request that makes this container, without its log's stream."""
    return pb.Start(**_fields(plan))


def encode_process(plan: ProcessPlan) -> pb.Process:
    """Return the process as a part of Start or Exec."""
    return pb.Process(**_fields(plan))


def encode_configuration(*parts: IdentityPlan | NetworkPlan) -> pb.Configure:
    """Return one request for all the parts."""
    return pb.Configure(**{name: value for part in parts for name, value in _fields(part).items()})


def encode_cgroup_files(files: Iterable[CgroupFile]) -> list[pb.CgroupFile]:
    """Return the files in their order."""
    return [pb.CgroupFile(**_fields(file)) for file in files]


def encode_huge_directories(directories: Iterable[HugeDirectory]) -> list[pb.HugeDirectory]:
    """Return the directories in their order."""
    return [pb.HugeDirectory(**_fields(directory)) for directory in directories]


def _fields(value: Struct) -> dict[str, Any]:
    return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}


def _plain(value: object) -> object:
    """Return what a message's constructor takes: dicts for messages, names for enumerators."""
    match value:
        case Enum():
            return value.name
        case Struct():
            return _fields(value)
        case tuple():
            return [_plain(each) for each in value]
    return value
