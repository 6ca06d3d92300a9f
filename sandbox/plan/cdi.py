"""Container Device Interface: what the node's specifications add to a container for a named device. Pure.

A name is VENDOR/CLASS=DEVICE. A file describes one VENDOR/CLASS (its `kind`). Where two files describe the
same device, the one in the later directory counts; two in one directory make the name ambiguous, so unusable.

A container in a VM gets what another kernel can provide: environment variables, mounts of the host's files,
group ids, and nodes of devices that the guest has too. A pod without a VM can have any node of the host.
Anything else is rejected with the reason. Source: the CDI specification (SPEC.md of its project), versions
up to 1.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence

import msgspec
import yaml
from msgspec.structs import replace

from sandbox.errors import InvalidSpec
from sandbox.host.ids import ID_MAX
from sandbox.plan.devices import GUEST_DEVICES
from sandbox.plan.mounts import MOUNT_OPTIONS
from sandbox.spec import ContainerSpec, DeviceSpec, MountSpec, Propagation, Value

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
ENDINGS = (".json", ".yaml")
SHOWN_MAX = 20  # names in an error

_KIND = re.compile(
    r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?", re.ASCII
)
_DEVICE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?", re.ASCII)
# options that a bind mount of Husk has in any case, or that other fields express
_IMPLIED = ("bind", "rbind", "ro", "rw", "suid", "dev", "exec", "relatime")
_MODES = {
    "private": Propagation.PRIVATE,
    "slave": Propagation.HOST_TO_CONTAINER,
    "shared": Propagation.BIDIRECTIONAL,
}


class SpecBroken(Exception):
    """A file is not a valid CDI specification."""


# ------------------------------------------------------------------------------------ the file


class _Part(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A part of a file. An unknown field could change what a device means, so it is an error."""


class DeviceNode(_Part, frozen=True):
    """A device node; `path` is in the container, `host_path`, if it differs, on the node."""

    path: str
    host_path: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | str | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class Mount(_Part, frozen=True):
    """A bind mount."""

    host_path: str
    container_path: str
    type: str = ""
    options: tuple[str, ...] = ()


class Edits(_Part, frozen=True):
    """What a device adds to a container.

    `hooks`, `intel_rdt` and `net_devices` are rejected, so their content is not checked.
    """

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[dict[str, object], ...] = ()
    intel_rdt: dict[str, object] | None = None
    net_devices: tuple[dict[str, object], ...] = ()
    # spelled differently in the specification's text and in its Go library
    additional_gids: tuple[int, ...] = ()
    additional_gids_of_library: tuple[int, ...] = msgspec.field(default=(), name="additionalGIDs")


class Device(_Part, frozen=True):
    """One device of a kind."""

    name: str
    container_edits: Edits
    annotations: dict[str, str] = {}


class Spec(_Part, frozen=True):
    """A file: the devices of one kind, and what each of them adds besides."""

    cdi_version: str
    kind: str
    devices: tuple[Device, ...]
    container_edits: Edits = Edits()
    annotations: dict[str, str] = {}


def parse(data: bytes, name: str) -> Spec:
    """Return the specification in a file's content; `name` says by its suffix whether it is JSON or YAML.

    Raises SpecBroken with the reason.
    """
    try:
        tree = json.loads(data) if name.endswith(".json") else yaml.safe_load(data)
        spec = msgspec.convert(tree, Spec)
    except msgspec.ValidationError as error:
        raise SpecBroken(str(error)) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise SpecBroken(f"cannot be read: {error}") from error
    if spec.cdi_version not in VERSIONS:
        raise SpecBroken(f"cdiVersion {spec.cdi_version!r} is not known ({', '.join(VERSIONS)})")
    if not _KIND.fullmatch(spec.kind):
        raise SpecBroken(f"kind {spec.kind!r} is not VENDOR/CLASS")
    names = [device.name for device in spec.devices]
    for device in names:
        if not _DEVICE.fullmatch(device):
            raise SpecBroken(f"{device!r} is not a device's name")
        if names.count(device) > 1:
            raise SpecBroken(f"device {device!r} is described twice")
    return spec


# --------------------------------------------------------------------------------- all of them


class Found(Value, frozen=True, kw_only=True):
    """The devices of all directories by their qualified names, and what is wrong with others."""

    devices: dict[str, tuple[Spec, Device]]
    problems: dict[str, str]  # by device name, or by the file's path


def gather(directories: Iterable[Sequence[tuple[str, Spec]]]) -> Found:
    """Return what the directories hold.

    Each is a list of files' paths and specifications; the directory of the least precedence comes first.
    """
    devices: dict[str, tuple[Spec, Device]] = {}
    problems: dict[str, str] = {}
    for files in directories:
        here: dict[str, str] = {}
        for path, spec in files:
            for device in spec.devices:
                name = f"{spec.kind}={device.name}"
                if name in here:
                    problems[name] = f"both {here[name]} and {path} describe it"
                    devices.pop(name, None)
                    continue
                here[name] = path
                problems.pop(name, None)
                devices[name] = (spec, device)
    return Found(devices=devices, problems=problems)


# -------------------------------------------------------------------------------- a container's


def apply(
    container: ContainerSpec, found: Found, *, in_vm: bool = True, disks: Iterable[str] = ()
) -> ContainerSpec:
    """Return the container with all that its CDI devices add; `disks` are block devices of the host.

    Raises InvalidSpec with the field.
    """
    nodes = frozenset((*GUEST_DEVICES, *disks)) if in_vm else None
    once: set[int] = set()  # a file's own edits apply once, however many of its devices are requested
    for name, field in {request.name: request.field for request in container.cdi_devices}.items():
        spec, device = _look_up(name, field, found)
        if id(spec) not in once:
            container = _edited(container, spec.container_edits, nodes, _refusal(name, field))
        once.add(id(spec))
        container = _edited(container, device.container_edits, nodes, _refusal(name, field))
    return container


def _refusal(name: str, field: str) -> Refuse:
    accepted = "devices that add variables, files of the host, groups, and device nodes that exist there"
    return lambda problem: InvalidSpec(field, f"{name!r} cannot be provided: {problem}", accepted)


def _look_up(name: str, field: str, found: Found) -> tuple[Spec, Device]:
    kind, equals, device = name.partition("=")
    if not (equals and _KIND.fullmatch(kind) and _DEVICE.fullmatch(device)):
        raise InvalidSpec(field, f"{name!r} is not the name of a CDI device", "VENDOR/CLASS=DEVICE")
    if name in found.devices:
        return found.devices[name]
    problem = found.problems.get(name) or "no CDI specification of this node describes it"
    broken = "; ".join(f"{path}: {text}" for path, text in found.problems.items() if path.startswith("/"))
    raise InvalidSpec(field, f"{name!r}: {problem}" + (f" ({broken})" if broken else ""), _known(found))


def _known(found: Found) -> str:
    names = sorted(found.devices)
    shown = ", ".join(names[:SHOWN_MAX]) + (
        f" and {len(names) - SHOWN_MAX} more" if len(names) > SHOWN_MAX else ""
    )
    return shown or "none: this node has no CDI devices"


Refuse = Callable[[str], InvalidSpec]


def _edited(
    container: ContainerSpec, edits: Edits, nodes: frozenset[str] | None, refuse: Refuse
) -> ContainerSpec:
    """Return the container with these edits. `nodes` are the devices that exist; None: all of the host's."""
    if edits.hooks:
        hooks = ", ".join(str(hook.get("path", "?")) for hook in edits.hooks)
        raise refuse(f"its hooks ({hooks}) are not supported")
    if edits.intel_rdt is not None:
        raise refuse("its intelRdt, which partitions caches of the host's CPUs, is not supported")
    if edits.net_devices:
        raise refuse("its netDevices, which move interfaces of the host, are not supported")
    envs = dict(container.envs)
    for text in edits.env:
        key, equals, value = text.partition("=")
        if not key or not equals or "\0" in text:
            raise refuse(f"its env {text!r} is not NAME=VALUE")
        envs[key] = value.encode()
    # the specification says to ignore 0, which would grant root's group
    gids = [gid for gid in (*edits.additional_gids, *edits.additional_gids_of_library) if gid]
    for gid in gids:
        if not 0 < gid <= ID_MAX:
            raise refuse(f"its group {gid} is not a valid id")
    groups = tuple(dict.fromkeys((*container.security.supplemental_groups, *gids)))
    mounts = [_mount(mount, container.security.privileged, refuse) for mount in edits.mounts]
    devices = [_device(node, nodes, refuse) for node in edits.device_nodes]
    return replace(
        container,
        envs=tuple(envs.items()),
        mounts=(*container.mounts, *mounts),
        devices=(*container.devices, *devices),
        security=replace(container.security, supplemental_groups=groups),
    )


def _mount(mount: Mount, privileged: bool, refuse: Refuse) -> MountSpec:
    if mount.type not in ("", "bind", "none"):
        raise refuse(f"its mount on {mount.container_path!r} is of type {mount.type!r}, not a bind")
    for path in (mount.host_path, mount.container_path):
        if not path.startswith("/") or "\0" in path:
            raise refuse(f"its mount of {path!r} does not have an absolute path")
    propagation = Propagation.PRIVATE
    for option in mount.options:
        if (mode := _MODES.get(option.removeprefix("r"))) is not None:
            propagation = mode
        elif option not in (*_IMPLIED, *MOUNT_OPTIONS):
            raise refuse(
                f"its mount on {mount.container_path!r} has the option {option!r}, which is not supported"
            )
    if propagation is Propagation.BIDIRECTIONAL and not privileged:
        raise refuse(f"its mount on {mount.container_path!r} is shared, and the container is not privileged")
    return MountSpec(
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly="ro" in mount.options,
        propagation=propagation,
        options=tuple(option for option in MOUNT_OPTIONS if option in mount.options),
    )


def _device(node: DeviceNode, nodes: frozenset[str] | None, refuse: Refuse) -> DeviceSpec:
    host_path = node.host_path or node.path
    if nodes is not None and host_path not in nodes:
        raise refuse(f"its {host_path!r} is a device of the host; a guest has {', '.join(GUEST_DEVICES)}")
    if not node.path.startswith("/") or "\0" in node.path:
        raise refuse(f"its node {node.path!r} has no absolute path")
    permissions = node.permissions or "rwm"
    if set(permissions) - set("rwm"):
        raise refuse(
            f"its node {node.path!r} has the permissions {permissions!r}, which are not letters of rwm"
        )
    return DeviceSpec(container_path=node.path, host_path=host_path, permissions=permissions)
