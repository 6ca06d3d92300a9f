"""Records of earlier versions, turned into those of this version.

A migration is a pure function from the JSON object of version N to that of version N + 1, and never
changes once it is released; tests/golden/records holds a file of each version for ever. A record without
a version is of version 1: that daemon left out fields that had their default value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sandbox.records import VERSION

Json = Mapping[str, object]


class TooNew(ValueError):
    """The record was written by a newer Husk, which alone knows what it means."""

    def __init__(self, version: int) -> None:
        super().__init__(f"it has version {version}; this Husk reads versions 1 to {VERSION}")
        self.version = version


def migrate(kind: str, record: object) -> Json:
    """Return a record ("pod" or "container") as this version writes it; the argument stays unchanged.

    Raises ValueError (TooNew for a higher version) for what is not a record of any version. That each
    field has the right type is for the decoder to check.
    """
    fields = _object(record)
    version = fields.get("version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{version!r} is not a version")
    if version > VERSION:
        raise TooNew(version)
    while version < VERSION:
        fields = {**_MIGRATIONS[kind, version](fields), "version": version + 1}
        version += 1
    return fields


def _pod_from_1(record: Json) -> Json:
    """What a pod runs in becomes one object, and QEMU's own options leave the fields of all drivers."""
    fields = dict(record)
    moved = {name: fields.pop(name) for name in _RUNTIME_FIELDS_1 if name in fields}
    if fields.pop("isolation", "vm") == "process":
        return {**fields, "runtime": {"type": "process"} | _picked(moved, "init", "holder")}
    kept = _picked(moved, "size", "source", "accelerator", "token", "epoch", "guest_kernel")
    runtime: dict[str, object] = {"type": "vm"} | kept
    if cpu := moved.get("cpu"):
        runtime["options"] = {"cpu": cpu}
    if moved.get("vm") is not None:
        runtime["handle"] = _handle_from_1(_object(moved["vm"]))
    return {**fields, "runtime": runtime}


_RUNTIME_FIELDS_1 = (
    "size",
    "source",
    "accelerator",
    "cpu",
    "vm",
    "token",
    "epoch",
    "guest_kernel",
    "init",
    "holder",
)
_SHARE_PORTS_1 = 2  # of `ports`; the first NIC had a fixed slot, each further one took a port


def _handle_from_1(handle: Json) -> Json:
    spec = dict(_object(handle.get("spec")))
    options = {name: spec.pop(name) for name in ("machine", "cpu") if name in spec}
    ports = spec.pop("ports", 0)
    if isinstance(ports, int) and ports > _SHARE_PORTS_1:
        spec["max_nics"] = ports - _SHARE_PORTS_1 + 1
    return {**handle, "spec": {**spec, "hypervisor": handle.get("hypervisor", ""), "options": options}}


def _container_from_1(record: Json) -> Json:
    """Nothing moved: `rootfs`, which is new, is absent until a root filesystem was made."""
    return record


_MIGRATIONS: Mapping[tuple[str, int], Callable[[Json], Json]] = {
    ("pod", 1): _pod_from_1,
    ("container", 1): _container_from_1,
}


def _picked(fields: Json, *names: str) -> dict[str, object]:
    return {name: fields[name] for name in names if name in fields}


def _object(value: object) -> Json:
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, not {type(value).__name__}")
    return value
