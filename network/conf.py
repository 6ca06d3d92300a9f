"""CNI network configurations: which one is in force, and what each plug-in of it gets.

As in containerd: the first file of the directory in lexical order, of those that end in .conflist, .conf or
.json, is the pods' network. When it is invalid the network is not ready; the next file is not tried, as
falling back silently would attach pods to another network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from network.errors import NetworkNotReady
from network.result import NEWEST, VERSIONS, version_key

SUFFIXES = (".conflist", ".conf", ".json")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")  # CNI SPEC, "Network configuration format"
_MAX_BYTES = 1 << 20


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a network's list of plug-ins."""

    type: str
    capabilities: tuple[str, ...] = ()  # those that are declared true
    json: str  # its configuration object, as written


class NetworkConf(msgspec.Struct, frozen=True, kw_only=True):
    """A network: plug-ins to be run in order. Stored with each pod, so that DEL does not need the file."""

    name: str
    version: str
    plugins: tuple[Plugin, ...]
    disable_check: bool = False
    disable_gc: bool = False
    file: str = ""

    def at_least(self, version: str) -> bool:
        """Whether the network uses this version of the CNI SPEC or a newer one."""
        return version_key(self.version) >= version_key(version)


class _WirePlugin(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    capabilities: dict[str, bool] | None = None


class _WireList(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str = msgspec.field(default="", name="cniVersion")
    versions: tuple[str, ...] = msgspec.field(default=(), name="cniVersions")
    disable_check: bool | str = msgspec.field(default=False, name="disableCheck")
    disable_gc: bool | str = msgspec.field(default=False, name="disableGC")
    plugins: tuple[msgspec.Raw, ...] = ()


def list_files(directory: Path) -> list[Path]:
    """List the candidate files; the first is in force. Empty for a directory that does not exist."""
    try:
        files = [path for path in directory.iterdir() if path.suffix in SUFFIXES]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(files, key=lambda path: path.name)


def find_conf(directory: Path) -> NetworkConf:
    """Read the configuration in force. Raises NetworkNotReady with what is missing or invalid."""
    files = list_files(directory)
    if not files:
        wanted = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise NetworkNotReady(f"no CNI configuration in {directory}: install one there ({wanted})")
    path = files[0]
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        return parse_conf(data, path)
    except (OSError, ValueError) as error:
        raise NetworkNotReady(f"CNI configuration {path} is not usable, correct it: {error}") from error


def parse_conf(data: bytes, path: Path) -> NetworkConf:
    """Parse a file's content; a file with a single plug-in is a list of one. Raises ValueError."""
    wire = msgspec.json.decode(data, type=_WireList)
    if path.suffix == ".conflist":
        raw = [bytes(plugin) for plugin in wire.plugins]
        if not raw:
            raise ValueError("it lists no plug-ins")
    else:
        raw = [data]
        if wire.plugins:
            raise ValueError("a file with a list of plug-ins must end in .conflist")
    if not _NAME.fullmatch(wire.name):
        raise ValueError(f"{wire.name!r} is not a valid network name")
    return NetworkConf(
        name=wire.name,
        version=choose_version(wire.version, wire.versions),
        plugins=tuple(map(_parse_plugin, raw)),
        disable_check=_truth(wire.disable_check),
        disable_gc=_truth(wire.disable_gc),
        file=str(path),
    )


def choose_version(version: str, versions: tuple[str, ...]) -> str:
    """Choose the newest version that the file offers and Husk supports (CNI SPEC 1.1, cniVersions).

    Raises ValueError when there is none.
    """
    offered = [each for each in (version, *versions) if each]
    supported = [each for each in offered if each in VERSIONS]
    if not supported:
        found = ", ".join(offered) or "none"
        raise ValueError(f"cniVersion {found} is not supported; accepted: {VERSIONS[0]} to {NEWEST}")
    return max(supported, key=version_key)


def _parse_plugin(raw: bytes) -> Plugin:
    wire = msgspec.json.decode(raw, type=_WirePlugin)
    if not wire.type or "/" in wire.type or wire.type in (".", ".."):
        raise ValueError(f"{wire.type!r} is not a valid plug-in name")
    declared = tuple(name for name, wanted in (wire.capabilities or {}).items() if wanted)
    return Plugin(type=wire.type, capabilities=declared, json=raw.decode())


def _truth(value: bool | str) -> bool:
    return value.lower() == "true" if isinstance(value, str) else value


def execution_conf(
    conf: NetworkConf,
    plugin: Plugin,
    *,
    capabilities: Mapping[str, msgspec.Raw] | None = None,
    extra: Mapping[str, msgspec.Raw] | None = None,
) -> bytes:
    """Compose what a plug-in reads on its stdin (CNI SPEC, "Deriving execution configuration").

    That is the object as the administrator wrote it, with the network's name and version, those of the
    runtime's `capabilities` that the plug-in declares, and `extra` (prevResult and the like).
    """
    fields = msgspec.json.decode(plugin.json.encode(), type=dict[str, msgspec.Raw])
    for administrative in ("capabilities", "cniVersions", "disableCheck", "disableGC"):
        fields.pop(administrative, None)
    fields["cniVersion"] = msgspec.Raw(msgspec.json.encode(conf.version))
    fields["name"] = msgspec.Raw(msgspec.json.encode(conf.name))
    runtime = {name: value for name, value in (capabilities or {}).items() if name in plugin.capabilities}
    if runtime:
        fields["runtimeConfig"] = msgspec.Raw(msgspec.json.encode(runtime))
    fields.update(extra or {})
    return msgspec.json.encode(fields)
