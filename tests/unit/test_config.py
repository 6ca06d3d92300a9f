"""The configuration file: defaults, options of the command line, and errors that name the key."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from cri import config as module
from cri.config import Config, ConfigError, load, to_toml
from image.budget import Limits

TRUST = 'registry.trust."a.test/team"'


def write(path: Path, text: str) -> Path:
    file = path / "config.toml"
    file.write_text(text)
    return file


def refusal(path: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(write(path, text))
    return caught.value


@pytest.fixture(autouse=True)
def _no_configuration_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "DEFAULT_FILE", tmp_path / "absent.toml")


def test_load_without_a_file_has_the_defaults() -> None:
    config = load()
    assert (config.root, config.run, config.socket) == ("/var/lib/husk", "/run/husk", "/run/husk/husk.sock")
    assert config.metrics.address == "127.0.0.1"
    assert list(config.runtime_handlers()) == [""]


def test_other_root_has_its_own_run_directory() -> None:
    config = load(root="/srv/second")
    assert (config.run, config.socket) == ("/srv/second/run", "/srv/second/run/husk.sock")


def test_options_of_the_command_line_override_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'root = "/a"\nrun = "/b"\nsocket = "/c.sock"\n')
    assert load(file).socket == "/c.sock"
    config = load(file, root="/x", socket="/y.sock")
    assert (config.root, config.run, config.socket) == ("/x", "/b", "/y.sock")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_streaming_on_loopback_without_tls_is_accepted(tmp_path: Path, address: str) -> None:
    config = load(write(tmp_path, f"[streaming]\naddress = '{address}'\n"))
    assert config.streaming.address == address


def test_streaming_on_another_address_with_tls_is_accepted(tmp_path: Path) -> None:
    tls = "tls_cert = '/etc/husk/cert.pem'\ntls_key = '/etc/husk/key.pem'\n"
    config = load(write(tmp_path, f"[streaming]\naddress = '192.0.2.1'\nport = 10010\n{tls}"))
    assert (config.streaming.port, config.streaming.tls_key) == (10010, "/etc/husk/key.pem")


def test_named_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[streaming]\naddress = 'node'", "streaming.address", "an IP address of this host"),
        ("[streaming]\naddress = '0.0.0.0'", "streaming.address", "one IP address of this host"),
        ("[streaming]\naddress = '192.0.2.1'", "streaming.address", "a loopback address, or TLS"),
        ("[streaming]\naddress = 'fd00::1'", "streaming.address", "a loopback address, or TLS"),
        ("[streaming]\ntls_cert = '/c.pem'", "streaming.tls_key", "both tls_cert and tls_key, or neither"),
        ("[streaming]\ntls_key = '/k.pem'", "streaming.tls_cert", "both tls_cert and tls_key, or neither"),
        ("[streaming]\ntls_key = 'k'\ntls_cert = '/c'", "streaming.tls_key", "an absolute path"),
        ("[streaming]\nidle_timeout_s = 0", "streaming.idle_timeout_s", "a whole number from 1 to 604800"),
        ("[streaming]\nport = 65536", "streaming.port", "a whole number from 0 to 65535"),
        ("rooot = '/a'", "rooot", "did you mean 'root'?"),
        ("[log]\nlevle = 'info'", "log.levle", "accepted: level, format"),
        ("[handlers.small]\nmemory = 1", "handlers.small.memory", "did you mean 'memory_mib'?"),
        ("root = 3", "root", "accepted: a string"),
        ("[metrics]\nport = '80'", "metrics.port", "accepted: a whole number from 0 to 65535"),
        ("[metrics]\nport = 70000", "metrics.port", "0 to 65535"),
        ("[metrics]\nport = true", "metrics.port", "0 to 65535"),
        ("[log]\nlevel = 'loud'", "log.level", "debug, info, warning, error"),
        ("log = 'info'", "log", "accepted: a table"),
        ("[handlers.small]\nvcpus = 0", "handlers.small.vcpus", "1 to 255"),
        ("[handlers.small]\naccelerator = 'xen'", "handlers.small.accelerator", "auto, kvm, tcg"),
        ("[handlers.small]\nhypervisor = 'bhyve'", "handlers.small.hypervisor", "qemu"),
        ("[handlers.small]\noptions = 'q35'", "handlers.small.options", "a table"),
        ("[handlers.small]\noptions.bios = 'x'", "handlers.small.options.bios", "machine, cpu"),
        ("[handlers.small]\nmachine = 'a,b'", "handlers.small.options.machine", "letters, digits"),
        ("[handlers.'Not a name']", "handlers.Not a name", "lower-case"),
        ("[handlers]\nsmall = 4", "handlers.small", "accepted: a table"),
        ("handlers = 4", "handlers", "accepted: a table"),
        ("default_handler = 'big'\n[handlers.small]", "default_handler", "accepted: small"),
        ("root = 'var/lib/husk'", "root", "an absolute path"),
        ("[cni]\nbin_dirs = ['bin']", "cni.bin_dirs[0]", "an absolute path"),
        ("[cni]\nbin_dirs = [1]", "cni.bin_dirs[0]", "a list of strings"),
        ("[cni]\nbin_dirs = '/bin'", "cni.bin_dirs", "a list of strings"),
        ("socket = '/" + "s" * 120 + "'", "socket", "at most 107 bytes"),
        ("root = '/a/../b'", "root", "without .."),
        ("[images]\npinned = ['*']", "images.pinned[0]", "matches every image"),
        ("[images]\npreload_dir = 'x'", "images.preload_dir", "an absolute path"),
        ("[registry]\nauth_file = 'x'", "registry.auth_file", "an absolute path"),
        ("[registry]\ntrust = 4", "registry.trust", "a table"),
        ("[registry.trust]\nx = 4", "registry.trust.x", "a table"),
        (f"[{TRUST}]\nkey = 'x'", f"{TRUST}.key", "did you mean 'keys'?"),
        (f"[{TRUST}]\npolicy = 'x'", f"{TRUST}.policy", "none, refuse, key, verifier"),
        (f"[{TRUST}]\npolicy = 'key'", f"{TRUST}.keys", "is needed"),
        (f"[{TRUST}]\nkeys = ['/k']", f"{TRUST}.keys", "has no use"),
        (f"[{TRUST}]\npolicy = 'key'\nkeys = ['k']", f"{TRUST}.keys[0]", "an absolute path"),
        (f"[{TRUST}]\npolicy = 'key'\nkeys = ['/absent/k']", f"{TRUST}.keys[0]", "No such file"),
        (f"[{TRUST}]\npolicy = 'key'\nkeys = ['/dev/null']", f"{TRUST}.keys[0]", "not a public key"),
        (f"[{TRUST}]\npolicy = 'verifier'\nverifier = '/dev/null'", f"{TRUST}.verifier", "not a program"),
        ("[registry.trust.busybox]", "registry.trust.busybox", "does not begin with a registry"),
        ("[registry.trust.'a.b/C']", 'registry.trust."a.b/C"', "must be lower case"),
    ],
)
def test_invalid_value_is_named_with_what_is_accepted(
    tmp_path: Path, text: str, key: str, expected: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.key == key
    assert expected in str(error)
    assert str(tmp_path / "config.toml") in str(error)


def test_malformed_toml_names_the_line(tmp_path: Path) -> None:
    assert "line 1" in str(refusal(tmp_path, "root = \n"))


def test_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"root = '\xff'")
    with pytest.raises(ConfigError, match="is not TOML"):
        load(file)


def test_handlers_have_every_default(tmp_path: Path) -> None:
    file = write(tmp_path, 'default_handler = "big"\n[handlers.big]\nmemory_mib = 4096\n[handlers.small]\n')
    handlers = load(file).runtime_handlers()
    assert list(handlers) == ["", "big", "small"]
    assert (handlers[""].name, handlers[""].memory_mib) == ("", 4096)
    assert (handlers["small"].hypervisor, handlers["small"].accelerator) == ("qemu", "auto")


def test_printed_configuration_loads_unchanged(tmp_path: Path) -> None:
    file = write(tmp_path, '[handlers.big]\nmemory_mib = 4096\n[cni]\nbin_dirs = ["/a b", "/ü\\"x"]\n')
    config = load(file)
    assert load(write(tmp_path, to_toml(config))) == config
    assert tomllib.loads(to_toml(Config()))["log"] == {"level": "info", "format": "text"}


def test_documentation_lists_every_key() -> None:
    """docs/configuration.md names each key in the table of its section."""
    text = (Path(__file__).resolve().parents[2] / "docs/configuration.md").read_text()
    top, *sections = text.split("\n### ")
    keys = {"": top} | {section.split("`", 2)[1].strip("[]"): section for section in sections}
    tables: dict[str, type[module.Table]] = {
        "": Config,
        "handlers.NAME": module.HandlerTable,
        "registry.trust.PREFIX": module.TrustTable,
    }
    for field in msgspec.structs.fields(Config):
        if isinstance(field.type, type) and issubclass(field.type, module.Table):
            tables[field.name] = field.type
    for name, table in tables.items():
        for field in msgspec.structs.fields(table):
            if field.name not in tables and field.name not in ("handlers", "limits", "trust"):
                assert f"| `{field.name}` |" in keys[name], f"{name}.{field.name}"


def test_documentation_lists_every_limit_with_its_default() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/configuration.md").read_text()
    table = text.partition("### `[registry.limits]`")[2].partition("\n### ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| `(\d+)`", table, re.MULTILINE))
    assert documented == {key: str(value) for key, value in msgspec.structs.asdict(Limits()).items()}


def test_limit_of_a_registry_is_read_and_a_wrong_one_named(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[registry.limits]\nlayer_entries = 7\n")
    assert load(file).registry.limits == Limits(layer_entries=7)
    for line, key in (("layer_entries = 0", "layer_entries"), ("layer_entrys = 1", "layer_entrys")):
        file.write_text(f"[registry.limits]\n{line}\n")
        with pytest.raises(ConfigError) as caught:
            load(file)
        assert caught.value.key == f"registry.limits.{key}" and caught.value.accepted


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        ("machine = 'pc'", "pc"),
        ("options.machine = 'pc'", "pc"),
        ("machine = 'pc'\noptions.machine = 'microvm'", "microvm"),
    ],
)
def test_machine_of_a_handler_becomes_an_option_of_its_driver(
    tmp_path: Path, text: str, machine: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[handlers.small]\n{text}\n")
    config = load(file)
    assert config.runtime_handlers()["small"].options == {"machine": machine}
    file.write_text(to_toml(config))
    assert load(file) == config
