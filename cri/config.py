"""The configuration file: its keys, their defaults, and the checks of their values.

`load` reads TOML, applies the options of the command line and fills in every default, so no value of a
`Config` is unset. While the daemon runs only `cri/daemon.py` reads it. An unknown key or a value of another
type is an error, as a typo would otherwise go unnoticed.
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

from image.budget import Limits
from image.trust.policies import Policy, check_policy, check_prefix
from sandbox.errors import InvalidSpec
from sandbox.host import size
from sandbox.spec import Handler
from sandbox.vmm.drivers import find_host

DEFAULT_FILE = Path("/etc/husk/config.toml")
DEFAULT_ROOT = "/var/lib/husk"
DEFAULT_RUN = "/run/husk"
SOCKET_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, one of them ends it

T = TypeVar("T")

_BARE = re.compile(r"[A-Za-z0-9_-]+")  # TOML, "Keys"
_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|[^.]+')

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class ConfigError(Exception):
    """The configuration is invalid: the file, the key by its path, the problem, and the accepted values."""

    def __init__(self, source: str, key: str, problem: str, accepted: str = "") -> None:
        where = f"{source}: {key}" if key else source
        super().__init__(f"{where}: {problem}" + (f"; accepted: {accepted}" if accepted else ""))
        self.source = source
        self.key = key
        self.problem = problem
        self.accepted = accepted


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the file's tables."""


class Log(Table, frozen=True, kw_only=True):
    """[log]"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Metrics(Table, frozen=True, kw_only=True):
    """[metrics]: where /metrics and /healthz are served."""

    address: str = "127.0.0.1"
    port: Port = 9477  # 0: not served


class Streaming(Table, frozen=True, kw_only=True):
    """[streaming]: where exec, attach and port-forward sessions are served."""

    address: str = "127.0.0.1"
    port: Port = 0  # 0: any free port
    idle_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=7 * 24 * 3600)] = 4 * 3600
    tls_cert: str = ""
    tls_key: str = ""


class Cni(Table, frozen=True, kw_only=True):
    """[cni]: the network of pods."""

    conf_dir: str = "/etc/cni/net.d"
    bin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni")


class Cdi(Table, frozen=True, kw_only=True):
    """[cdi]: if two directories describe the same device, the later directory wins."""

    spec_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")


class Volumes(Table, frozen=True, kw_only=True):
    """[volumes]"""

    live_paths: tuple[str, ...] = ()  # patterns of read-only mounts that a guest has a copy of


class Images(Table, frozen=True, kw_only=True):
    """[images]: images that are on the node whatever the kubelet does."""

    pinned: tuple[str, ...] = ()  # patterns of full names
    preload_dir: str = ""  # default: ROOT/preload


class TrustTable(Table, frozen=True, kw_only=True):
    """[registry.trust."PREFIX"]: which images of a prefix may be pulled, see `image.trust`."""

    policy: Literal["none", "refuse", "key", "verifier"] = "none"
    keys: tuple[str, ...] = ()
    match: Literal["digest", "repository"] = "digest"
    verifier: str = ""


class Registry(Table, frozen=True, kw_only=True):
    """[registry]: how images are pulled."""

    config_path: str = "/etc/husk/certs.d"  # has <host>/hosts.toml
    auth_file: str = "/etc/husk/auth.json"  # docker's config.json
    max_concurrent_downloads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    connections_per_layer: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    max_concurrent_unpacks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    min_free_mib: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 128  # 0: no limit
    min_rate_10s: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 1 << 10  # bytes per second; 0: no limit
    min_rate_60s: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 64 << 10
    connect_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 15
    stall_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 30
    answer_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 60
    blob_timeout_s: Annotated[int, msgspec.Meta(ge=0, le=604800)] = 7200  # 0: no limit
    pull_timeout_s: Annotated[int, msgspec.Meta(ge=0, le=604800)] = 0  # 0: no limit
    limits: Limits = Limits()
    trust: dict[str, TrustTable] = {}

    def trust_policies(self) -> Mapping[str, Policy]:
        """Return the trust policy of each prefix of image names."""
        return {prefix: Policy(**msgspec.structs.asdict(table)) for prefix, table in self.trust.items()}


def _pool_size() -> int:
    """Return one VM per 4 GiB of the host's memory, of which they take 3 % at most; 2 to 8."""
    return max(2, min(8, size.memory_mib() >> 12))


class HandlerTable(Table, frozen=True, kw_only=True):
    """[handlers.NAME]: a kind of VM, which a RuntimeClass selects by NAME."""

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
    """The whole file. `load` fills in `run`, `socket` and `images.preload_dir`."""

    root: str = DEFAULT_ROOT
    run: str = ""  # default: DEFAULT_RUN, or ROOT/run with another root
    socket: str = ""  # default: RUN/husk.sock
    cgroup_root: str = "/husk"
    default_handler: str = ""  # handler of pods that name none; empty: one with the defaults
    log: Log = Log()
    metrics: Metrics = Metrics()
    streaming: Streaming = Streaming()
    cni: Cni = Cni()
    cdi: Cdi = Cdi()
    volumes: Volumes = Volumes()
    images: Images = Images()
    registry: Registry = Registry()
    handlers: dict[str, HandlerTable] = {}

    def runtime_handlers(self) -> Mapping[str, Handler]:
        """Return every handler by its name; the default one first, under ""."""
        default = self.handlers.get(self.default_handler, HandlerTable())
        tables = {"": default} | self.handlers
        return {name: Handler(name=name, **msgspec.structs.asdict(table)) for name, table in tables.items()}


def load(file: Path | None = None, *, root: str = "", socket: str = "") -> Config:
    """Return the configuration in force: the file's values, then `root` and `socket` if they are given.

    `file` must exist; DEFAULT_FILE, which is read without one, need not. Raises ConfigError.
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
            raise ConfigError(str(file), "", "the file does not exist") from error
        return {}
    except OSError as error:
        raise ConfigError(str(file), "", error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), "", f"is not TOML: {error}") from error


def parse(tree: Mapping[str, object], source: str) -> Config:
    """Convert a parsed TOML document. Raises ConfigError, which names the key by its path."""
    tree = _move_machine(tree)
    _refuse_unknown(tree, Config, "", source)
    registry = tree.get("registry")
    maps: tuple[tuple[str, object, type[Table]], ...] = (
        ("handlers", tree.get("handlers"), HandlerTable),
        ("registry.trust", registry.get("trust") if isinstance(registry, Mapping) else None, TrustTable),
    )
    for path, tables, shape in maps:
        # one by one, as msgspec's error within a map does not name the key
        for name, table in tables.items() if isinstance(tables, Mapping) else ():
            _convert(table, shape, f"{path}.{_key(name)}", source)
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
    """Fill in derived values, and check what the types do not express."""
    run = config.run or (DEFAULT_RUN if config.root == DEFAULT_ROOT else f"{config.root}/run")
    images = msgspec.structs.replace(
        config.images, preload_dir=config.images.preload_dir or f"{config.root}/preload"
    )
    config = msgspec.structs.replace(
        config, run=run, socket=config.socket or f"{run}/husk.sock", images=images
    )
    _check_paths(config, source)
    _check_handlers(config, source)
    _check_images(config, source)
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
        "registry.auth_file": config.registry.auth_file,
        "images.preload_dir": config.images.preload_dir,
    }
    paths |= {f"cni.bin_dirs[{n}]": path for n, path in enumerate(config.cni.bin_dirs)}
    paths |= {f"cdi.spec_dirs[{n}]": path for n, path in enumerate(config.cdi.spec_dirs)}
    paths |= {f"volumes.live_paths[{n}]": path for n, path in enumerate(config.volumes.live_paths)}
    for name, handler in config.handlers.items():
        optional = {"kernel": handler.kernel, "initramfs": handler.initramfs}
        paths |= {f"handlers.{name}.{key}": path for key, path in optional.items() if path}
    for prefix, trust in config.registry.trust.items():
        at = f"registry.trust.{_key(prefix)}"
        paths |= {f"{at}.keys[{n}]": path for n, path in enumerate(trust.keys)}
        paths |= {f"{at}.verifier": trust.verifier} if trust.verifier else {}
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
        # a DNS label, as the field `handler` of a RuntimeClass must be
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            accepted = "lower-case letters, digits and inner dashes, at most 63 characters"
            raise ConfigError(source, f"handlers.{name}", "is not a handler name", accepted)
        try:
            find_host(handler.hypervisor).check(handler.accelerator, handler.options)
        except InvalidSpec as error:
            raise ConfigError(
                source, f"handlers.{name}.{error.field}", error.problem, error.accepted
            ) from error
    if config.default_handler and config.default_handler not in config.handlers:
        known = ", ".join(config.handlers) or "nothing, as no handler is configured"
        raise ConfigError(
            source, "default_handler", f"handler {config.default_handler!r} is not configured", known
        )


def _check_images(config: Config, source: str) -> None:
    for n, pattern in enumerate(config.images.pinned):
        if not pattern.strip("*?"):
            problem = f"{pattern!r} matches every image"
            raise ConfigError(source, f"images.pinned[{n}]", problem, "a pattern of full names of images")
    for prefix, policy in config.registry.trust_policies().items():
        at = f"registry.trust.{_key(prefix)}"
        if problem := check_prefix(prefix):
            accepted = 'a registry, or a registry and the beginning of a path; or "*"'
            raise ConfigError(source, at, f"is not a prefix of image names: {problem}", accepted)
        key, problem = check_policy(policy)
        if problem:
            raise ConfigError(source, f"{at}.{key}", problem)


def _check_streaming(streaming: Streaming, source: str) -> None:
    try:
        address = ipaddress.ip_address(streaming.address)
    except ValueError as error:
        problem = f"{streaming.address!r} is not an IP address"
        raise ConfigError(source, "streaming.address", problem, "an IP address of this host") from error
    if address.is_unspecified:
        accepted = "one IP address of this host, which clients can connect to"
        raise ConfigError(
            source, "streaming.address", f"{address} is not the address of one interface", accepted
        )
    if bool(streaming.tls_cert) != bool(streaming.tls_key):
        missing = "tls_key" if streaming.tls_cert else "tls_cert"
        raise ConfigError(
            source, f"streaming.{missing}", "is missing", "both tls_cert and tls_key, or neither"
        )
    if not address.is_loopback and not streaming.tls_cert:
        problem = f"{address} can be reached from other hosts, which needs tls_cert and tls_key"
        raise ConfigError(source, "streaming.address", problem, "a loopback address, or TLS")


# ------------------------------------------------------------------------ errors with a path


def _refuse_unknown(tree: object, shape: type[msgspec.Struct], at: str, source: str) -> None:
    """Raise ConfigError for an unknown key, with the keys of its table (msgspec would not list them)."""
    if not isinstance(tree, Mapping):
        return  # the conversion reports that a table is expected
    fields = {field.name: field.type for field in msgspec.structs.fields(shape)}
    for key, value in tree.items():
        path = f"{at}{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problem = "unknown key" + (f", did you mean {near[0]!r}?" if near else "")
            raise ConfigError(source, path, problem, ", ".join(fields))
        kind = fields[key]
        inner = typing.get_args(kind)[-1] if typing.get_origin(kind) is dict else kind
        if not (isinstance(inner, type) and issubclass(inner, msgspec.Struct)):
            continue
        if inner is kind:
            _refuse_unknown(value, inner, f"{path}.", source)
        elif isinstance(value, Mapping):
            for name, table in value.items():
                _refuse_unknown(table, inner, f"{path}.{_key(name)}.", source)


def _key(name: str) -> str:
    """Return a key as TOML writes it: bare, or in quotes."""
    return name if _BARE.fullmatch(name) else json.dumps(name)


def _located(message: str) -> tuple[str, str]:
    """Split msgspec's message "problem - at `$.a.b[0]`" into ("a.b[0]", "problem")."""
    problem, _, path = message.partition(" - at `")
    key = path.rstrip("`").removeprefix("$").removeprefix(".")
    return key, problem[:1].lower() + problem[1:].replace("`", "")


def _accepted(key: str) -> str:
    """Describe the values that a key accepts, from its type."""
    shape: Any = Config
    for part in _PARTS.findall(re.sub(r"\[\d+\]$", "", key)):
        if shape is HandlerTable or (isinstance(shape, type) and issubclass(shape, msgspec.Struct)):
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
    """Return the configuration as a TOML file that `load` reads back unchanged."""
    return "\n".join(_table_lines(msgspec.to_builtins(config), ())).strip() + "\n"


def _table_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = (
        [f"[{'.'.join(map(_key, path))}]"]
        if path and not all(isinstance(v, dict) for v in table.values())
        else []
    )
    # strings, numbers, booleans and lists of JSON are valid TOML
    lines += [
        f"{_key(key)} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)
    ]
    for key, value in table.items():
        if isinstance(value, dict) and value:
            lines += ["", *_table_lines(value, (*path, key))]
    return lines
