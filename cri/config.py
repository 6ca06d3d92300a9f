"""The configuration file: what it may say, and what is in force when it says nothing.

`load` reads TOML, lays the command line over it and fills every default in, so a `Config` has no
"unset" left. Only `cri/daemon.py` reads one while the daemon runs. A key that is not listed here is
an error, as is a value of another type: silence would hide a typo until it hurts.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from sandbox.errors import InvalidSpec
from sandbox.host import size
from sandbox.spec import Handler
from sandbox.vmm.drivers import find_host

DEFAULT_FILE = Path("/etc/husk/config.toml")
DEFAULT_ROOT = "/var/lib/husk"
DEFAULT_RUN = "/run/husk"
SOCKET_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, one of them ends it

T = TypeVar("T")

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class ConfigError(Exception):
    """The configuration cannot be used: which file, which key, why, and what would be accepted."""

    def __init__(self, source: str, key: str, problem: str, accepted: str = "") -> None:
        where = f"{source}: {key}" if key else source
        super().__init__(f"{where}: {problem}" + (f"; accepted: {accepted}" if accepted else ""))
        self.source = source
        self.key = key
        self.problem = problem
        self.accepted = accepted


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the tables of the file."""


class Log(Table, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Metrics(Table, frozen=True, kw_only=True):
    address: str = "127.0.0.1"
    port: Port = 9477  # 0: no metrics are served


class Streaming(Table, frozen=True, kw_only=True):
    """Where clients find the streams of exec, attach and port-forward."""

    address: str = "127.0.0.1"
    port: Port = 0  # 0: any that is free
    idle_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=7 * 24 * 3600)] = 4 * 3600
    tls_cert: str = ""
    tls_key: str = ""


class Cni(Table, frozen=True, kw_only=True):
    conf_dir: str = "/etc/cni/net.d"
    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")


class Cdi(Table, frozen=True, kw_only=True):
    """Of a device that two directories describe, the later one's description counts."""

    spec_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")


class Registry(Table, frozen=True, kw_only=True):
    config_path: str = "/etc/husk/certs.d"  # <host>/hosts.toml below it
    max_concurrent_downloads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4


def _pool_size() -> int:
    """So many pods at once start as quickly as one; what waits takes 3 % of the host's memory at most."""
    return max(2, min(8, size.memory_mib() >> 12))


class HandlerTable(Table, frozen=True, kw_only=True):
    """[handlers.NAME]: a kind of VM that a RuntimeClass may name."""

    kernel: str = ""
    initramfs: str = ""
    memory_mib: Annotated[int, msgspec.Meta(ge=64, le=4 << 20)] = 256
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=255)] = 1
    hypervisor: str = "qemu"
    accelerator: str = "auto"
    options: dict[str, str] = {}
    source: Literal["pool", "template", "boot"] = "pool"
    pool_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = msgspec.field(default_factory=_pool_size)
    host_pods: Literal["process", "refuse"] = "process"


class Config(Table, frozen=True, kw_only=True):
    root: str = DEFAULT_ROOT
    run: str = ""  # DEFAULT_RUN, or ROOT/run beside another root
    socket: str = ""  # RUN/husk.sock
    cgroup_root: str = "/husk"
    default_handler: str = ""  # what the empty handler name means; empty: built-in values
    log: Log = Log()
    metrics: Metrics = Metrics()
    streaming: Streaming = Streaming()
    cni: Cni = Cni()
    cdi: Cdi = Cdi()
    registry: Registry = Registry()
    handlers: dict[str, HandlerTable] = {}

    def runtime_handlers(self) -> Mapping[str, Handler]:
        """Every handler by its name, the default one under "" and first."""
        default = self.handlers.get(self.default_handler, HandlerTable())
        tables = {"": default} | self.handlers
        return {name: Handler(name=name, **msgspec.structs.asdict(table)) for name, table in tables.items()}


def load(file: Path | None = None, *, root: str = "", socket: str = "") -> Config:
    """The configuration in force. A `file` that was named must exist; the default one need not.

    Raises ConfigError.
    """
    source = file or DEFAULT_FILE
    tree = _read(source, required=file is not None)
    config = parse(tree, str(source))
    changes = {key: value for key, value in (("root", root), ("socket", socket)) if value}
    return _complete(msgspec.structs.replace(config, **changes), str(source))


def _read(file: Path, *, required: bool) -> Mapping[str, object]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if required:
            raise ConfigError(str(file), "", "does not exist") from error
        return {}
    except OSError as error:
        raise ConfigError(str(file), "", error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), "", f"is not TOML: {error}") from error


def parse(tree: Mapping[str, object], source: str) -> Config:
    """Raises ConfigError, which names the key by its path."""
    tree = _move_machine(tree)
    _refuse_unknown(tree, Config, "", source)
    handlers = tree.get("handlers")
    for name, table in handlers.items() if isinstance(handlers, Mapping) else ():
        # one by one, as an error within a map does not say under which key
        _convert(table, HandlerTable, f"handlers.{name}", source)
    return _convert(tree, Config, "", source)


def _move_machine(tree: Mapping[str, object]) -> Mapping[str, object]:
    """Turn a handler's former key `machine` into QEMU's option of that name, unless that is set too."""
    handlers = tree.get("handlers")
    if not isinstance(handlers, Mapping):
        return tree
    moved: dict[str, object] = {}
    for name, table in handlers.items():
        moved[name] = table
        if isinstance(table, Mapping) and "machine" in table:
            options = table.get("options", {})
            rest = {key: value for key, value in table.items() if key != "machine"}
            if isinstance(options, Mapping):
                moved[name] = {**rest, "options": {"machine": table["machine"], **options}}
    return {**tree, "handlers": moved}


def _convert(tree: object, shape: type[T], at: str, source: str) -> T:
    try:
        return msgspec.convert(tree, shape, strict=True)
    except msgspec.ValidationError as error:
        inner, problem = _located(str(error))
        key = ".".join(part for part in (at, inner) if part)
        raise ConfigError(source, key, problem, _accepted(key)) from error


def _complete(config: Config, source: str) -> Config:
    """Fill the derived values in and check what no type says."""
    run = config.run or (DEFAULT_RUN if config.root == DEFAULT_ROOT else f"{config.root}/run")
    config = msgspec.structs.replace(config, run=run, socket=config.socket or f"{run}/husk.sock")
    _check_paths(config, source)
    _check_handlers(config, source)
    _check_streaming(config.streaming, source)
    return config


def _check_paths(config: Config, source: str) -> None:
    paths = {
        "root": config.root,
        "run": config.run,
        "socket": config.socket,
        "cgroup_root": config.cgroup_root,
        "cni.conf_dir": config.cni.conf_dir,
        "registry.config_path": config.registry.config_path,
    }
    paths |= {f"cni.bin_dirs[{n}]": path for n, path in enumerate(config.cni.bin_dirs)}
    paths |= {f"cdi.spec_dirs[{n}]": path for n, path in enumerate(config.cdi.spec_dirs)}
    for name, handler in config.handlers.items():
        optional = {"kernel": handler.kernel, "initramfs": handler.initramfs}
        paths |= {f"handlers.{name}.{key}": path for key, path in optional.items() if path}
    tls = {"tls_cert": config.streaming.tls_cert, "tls_key": config.streaming.tls_key}
    paths |= {f"streaming.{key}": path for key, path in tls.items() if path}
    for key, path in paths.items():
        if not path.startswith("/") or ".." in Path(path).parts:
            raise ConfigError(source, key, f"{path!r} is not an absolute path", "an absolute path without ..")
    if len(config.socket.encode()) > SOCKET_PATH_MAX:
        raise ConfigError(
            source, "socket", f"{config.socket!r} is too long", f"at most {SOCKET_PATH_MAX} bytes (unix(7))"
        )


def _check_handlers(config: Config, source: str) -> None:
    for name, handler in config.handlers.items():
        # the form that a RuntimeClass allows for its handler: a DNS label
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            accepted = "lower-case letters, digits and inner dashes, at most 63"
            raise ConfigError(source, f"handlers.{name}", "is not a handler name", accepted)
        try:
            find_host(handler.hypervisor).check(handler.accelerator, handler.options)
        except InvalidSpec as error:
            raise ConfigError(
                source, f"handlers.{name}.{error.field}", error.problem, error.accepted
            ) from error
    if config.default_handler and config.default_handler not in config.handlers:
        known = ", ".join(config.handlers) or "none is configured"
        raise ConfigError(source, "default_handler", f"no handler {config.default_handler!r}", known)


def _check_streaming(streaming: Streaming, source: str) -> None:
    try:
        address = ipaddress.ip_address(streaming.address)
    except ValueError as error:
        problem = f"{streaming.address!r} is no IP address"
        raise ConfigError(source, "streaming.address", problem, "an IP address of this host") from error
    if address.is_unspecified:
        accepted = "one IP address of this host: clients are sent to it"
        raise ConfigError(source, "streaming.address", f"{address} is nowhere in particular", accepted)
    if bool(streaming.tls_cert) != bool(streaming.tls_key):
        missing = "tls_key" if streaming.tls_cert else "tls_cert"
        raise ConfigError(source, f"streaming.{missing}", "is missing", "both tls_cert and tls_key, or none")
    if not address.is_loopback and not streaming.tls_cert:
        problem = f"{address} is open to others, and without tls_cert and tls_key they could listen in"
        raise ConfigError(source, "streaming.address", problem, "a loopback address, or TLS")


# ------------------------------------------------------------------------ errors with a path


def _refuse_unknown(tree: object, shape: type[Table], at: str, source: str) -> None:
    """Before conversion, so that the message can list what the table knows."""
    if not isinstance(tree, Mapping):
        return  # conversion tells that a table was expected
    fields = {field.name: field.type for field in msgspec.structs.fields(shape)}
    for key, value in tree.items():
        path = f"{at}{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problem = "unknown key" + (f", perhaps {near[0]!r} is meant" if near else "")
            raise ConfigError(source, path, problem, ", ".join(fields))
        kind = fields[key]
        if isinstance(kind, type) and issubclass(kind, Table):
            _refuse_unknown(value, kind, f"{path}.", source)
        elif key == "handlers" and isinstance(value, Mapping):
            for name, table in value.items():
                _refuse_unknown(table, HandlerTable, f"{path}.{name}.", source)


def _located(message: str) -> tuple[str, str]:
    """msgspec's `problem - at `$.a.b[0]`` as ("a.b[0]", "problem")."""
    problem, _, path = message.partition(" - at `")
    key = path.rstrip("`").removeprefix("$").removeprefix(".")
    return key, problem[:1].lower() + problem[1:].replace("`", "")


def _accepted(key: str) -> str:
    """What a key takes, in words, from its type."""
    shape: Any = Config
    for part in re.sub(r"\[\d+\]", "", key).split("."):
        if shape is HandlerTable or (isinstance(shape, type) and issubclass(shape, Table)):
            shape = {field.name: field.type for field in msgspec.structs.fields(shape)}.get(part)
        elif typing.get_origin(shape) is dict:
            shape = typing.get_args(shape)[1]
    if typing.get_origin(shape) is Literal:
        return ", ".join(typing.get_args(shape))
    if typing.get_origin(shape) is Annotated:
        meta = typing.get_args(shape)[1]
        return f"a whole number from {meta.ge}" + (f" to {meta.le}" if meta.le is not None else "")
    words = {str: "a string", int: "a whole number", tuple: "a list of strings", dict: "a table"}
    return words.get(typing.get_origin(shape) or shape, "a table" if isinstance(shape, type) else "")


# ------------------------------------------------------------------------------ as a file


def to_toml(config: Config) -> str:
    """The configuration as the file that would say it."""
    return "\n".join(_table_lines(msgspec.to_builtins(config), ())).strip() + "\n"


def _table_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"[{'.'.join(path)}]"] if path and not all(isinstance(v, dict) for v in table.values()) else []
    # JSON's strings, numbers and lists are also TOML's
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict) and value:
            lines += ["", *_table_lines(value, (*path, key))]
    return lines
