"""guest.proto is append-only: every field, enum value and its number, as released, stays what it is.

tests/golden/guest_fields.tsv lists them with the protocol version that introduced each. A new field or
enum value needs a new line there; HUSK_UPDATE_GOLDEN=1 appends it, and never changes or drops a line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from sandbox.guest import guest_pb2
from sandbox.guest.frames import MIN_VERSION, VERSION

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/guest_fields.tsv"
COLUMNS = ("owner", "name", "number", "type", "since")


class Entry(NamedTuple):
    """A field of a message, or a value of an enum."""

    owner: str  # name of the message or enum, without the package
    name: str
    number: int
    type: str  # "repeated uint32", "Mount", "oneof body: Ping", "value"


def field_type(field: FieldDescriptor) -> str:
    """As the .proto spells it, with the oneof that the field belongs to."""
    names = {
        number: name.removeprefix("TYPE_").lower()
        for name, number in vars(FieldDescriptor).items()
        if name.startswith("TYPE_")
    }
    named = field.message_type or field.enum_type
    kind = named.full_name.removeprefix("husk.guest.v1.") if named else names[field.type]
    if field.is_repeated:
        kind = f"repeated {kind}"
    return f"oneof {field.containing_oneof.name}: {kind}" if field.containing_oneof else kind


def messages(file: FileDescriptor) -> Iterator[Descriptor]:
    """All messages of the file, nested ones included."""
    waiting = list(file.message_types_by_name.values())
    while waiting:
        message = waiting.pop(0)
        yield message
        waiting += message.nested_types


def entries(file: FileDescriptor) -> list[Entry]:
    """Every field and enum value of the file, in the order of their numbers."""
    found: list[Entry] = []
    enums: list[EnumDescriptor] = list(file.enum_types_by_name.values())
    for message in messages(file):
        enums += message.enum_types
        owner = message.full_name.removeprefix(f"{file.package}.")
        found += [Entry(owner, field.name, field.number, field_type(field)) for field in message.fields]
    for enum in enums:
        owner = enum.full_name.removeprefix(f"{file.package}.")
        found += [Entry(owner, value.name, value.number, "value") for value in enum.values]
    return sorted(found, key=lambda entry: (entry.owner, entry.number))


def reserved(file: FileDescriptor) -> set[tuple[str, int | str]]:
    """What the file reserves: (message or enum, number) and (message or enum, name)."""
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    found: set[tuple[str, int | str]] = set()
    waiting: list[tuple[str, DescriptorProto]] = [(each.name, each) for each in proto.message_type]
    enums = [(each.name, each) for each in proto.enum_type]
    while waiting:
        owner, message = waiting.pop()
        found |= {(owner, name) for name in message.reserved_name}
        for numbers in message.reserved_range:  # the end is exclusive
            found |= {(owner, number) for number in range(numbers.start, numbers.end)}
        waiting += [(f"{owner}.{each.name}", each) for each in message.nested_type]
        enums += [(f"{owner}.{each.name}", each) for each in message.enum_type]
    for owner, enum in enums:
        found |= {(owner, name) for name in enum.reserved_name}
        for values in enum.reserved_range:  # the end is inclusive
            found |= {(owner, number) for number in range(values.start, values.end + 1)}
    return found


def read_golden(text: str) -> dict[Entry, int]:
    """Entries with the protocol version that introduced them."""
    head, *lines = text.splitlines()
    assert tuple(head.split("\t")) == COLUMNS
    rows = [line.split("\t") for line in lines]
    return {Entry(owner, name, int(number), kind): int(since) for owner, name, number, kind, since in rows}


def problems(file: FileDescriptor, golden: dict[Entry, int]) -> list[str]:
    """Where the file breaks the rule: empty if it keeps it."""
    now, kept = set(entries(file)), reserved(file)
    found = [f"{entry} is new: extend {GOLDEN.name}" for entry in sorted(now - set(golden))]
    for entry in sorted(set(golden) - now):
        missing = {(entry.owner, entry.number), (entry.owner, entry.name)} - kept
        reused = {(each.owner, each.number) for each in now} & {(entry.owner, entry.number)}
        if missing or reused:
            found.append(f"{entry} was changed, or removed without reserving its number and name")
    return found


def as_text(golden: dict[Entry, int]) -> str:
    lines = [(*entry, since) for entry, since in golden.items()]
    lines.sort(key=lambda line: (line[0], line[2], line[4]))
    return "".join("\t".join(map(str, line)) + "\n" for line in (COLUMNS, *lines))


def test_fields_and_enum_values_are_append_only() -> None:
    golden = read_golden(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("HUSK_UPDATE_GOLDEN"):
        golden |= {entry: VERSION for entry in entries(guest_pb2.DESCRIPTOR) if entry not in golden}
        GOLDEN.write_text(as_text(golden))
    assert not problems(guest_pb2.DESCRIPTOR, golden)


def test_golden_versions_are_within_what_is_spoken() -> None:
    golden = read_golden(GOLDEN.read_text())
    assert GOLDEN.read_text() == as_text(golden), "sorted, without doubles"
    assert set(golden.values()) <= set(range(2, VERSION + 1))
    assert MIN_VERSION <= VERSION


def test_fields_of_version_2_are_numbered_without_gaps_in_reading_order() -> None:
    first: dict[str, list[int]] = {}
    for entry, since in read_golden(GOLDEN.read_text()).items():
        if since == 2:
            first.setdefault(entry.owner, []).append(entry.number)
    for owner, numbers in first.items():
        begin = min(numbers)
        assert numbers == list(range(begin, begin + len(numbers))), owner
        assert begin in (0, 1), owner
    for message in messages(guest_pb2.DESCRIPTOR):
        declared = [field.number for field in message.fields]
        assert declared == sorted(declared), f"{message.name} is declared in the order of its numbers"


def test_agent_speaks_the_same_versions() -> None:
    header = (ROOT / "sandbox/agent/protocol.h").read_text()
    spoken = re.search(r"PROTOCOL_MIN = (\d+), PROTOCOL_MAX = (\d+)", header)
    assert spoken is not None
    assert (int(spoken[1]), int(spoken[2])) == (MIN_VERSION, VERSION)


def test_agent_has_a_handler_for_every_request() -> None:
    table = re.findall(
        r"\[HUSK__GUEST__V1__REQUEST__BODY_(\w+)\] =", (ROOT / "sandbox/agent/request.c").read_text()
    )
    bodies = guest_pb2.Request.DESCRIPTOR.oneofs_by_name["body"].fields
    assert sorted(table) == sorted(field.name.upper() for field in bodies)


# ------------------------------------------------------------------------- the rule itself


def compiled(name: str, *lines: str) -> FileDescriptor:
    """A file with a message `M` of these fields: "uint32 a = 1", "reserved 2", "reserved b"."""
    proto = FileDescriptorProto(name=f"{name}.proto", package="husk.guest.v1", syntax="proto3")
    message = proto.message_type.add(name="M")
    for line in lines:
        words = line.split()
        if words[0] == "reserved":
            if words[1].isdigit():
                message.reserved_range.add(start=int(words[1]), end=int(words[1]) + 1)
            else:
                message.reserved_name.append(words[1])
        else:
            kinds = {"uint32": FieldDescriptor.TYPE_UINT32, "string": FieldDescriptor.TYPE_STRING}
            field = message.field.add(name=words[1], number=int(words[3]))
            field.type = kinds[words[0]]  # type: ignore[assignment]
            field.label = FieldDescriptor.LABEL_OPTIONAL  # type: ignore[assignment]
    return DescriptorPool().AddSerializedFile(proto.SerializeToString())


BEFORE = ("uint32 a = 1", "uint32 b = 2")


@pytest.mark.parametrize(
    ("name", "after", "broken"),
    [
        ("same", BEFORE, False),
        ("added", (*BEFORE, "uint32 c = 3"), True),
        ("removed", ("uint32 a = 1",), True),
        ("reserved_number_alone", ("uint32 a = 1", "reserved 2"), True),
        ("reserved", ("uint32 a = 1", "reserved 2", "reserved b"), False),
        ("renumbered", ("uint32 a = 1", "uint32 b = 3"), True),
        ("retyped", ("uint32 a = 1", "string b = 2"), True),
        ("renamed", ("uint32 a = 1", "uint32 c = 2", "reserved b"), True),
    ],
)
def test_changed_field_is_found(name: str, after: tuple[str, ...], broken: bool) -> None:
    golden = dict.fromkeys(entries(compiled(f"{name}_before", *BEFORE)), 2)
    assert bool(problems(compiled(name, *after), golden)) is broken
