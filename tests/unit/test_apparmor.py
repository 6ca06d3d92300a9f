"""AppArmor: loaded profiles are found by name, and the default profile compiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.apparmor import policy_for, profile_name
from sandbox.apparmor.loaded import MAX_POLICY_BYTES
from sandbox.apparmor.profile import NAME, PROFILE, UNCONFINED, Policy
from sandbox.errors import InvalidSpec
from sandbox.guest_image import apparmor as compiler
from sandbox.guest_image import packages
from sandbox.guest_image.apparmor import compile_default, compile_policy, find_parser
from sandbox.spec import AppArmor, AppArmorKind
from tests.kit import apparmor

DEFAULT = AppArmor(kind=AppArmorKind.RUNTIME_DEFAULT)


def local(name: str) -> AppArmor:
    return AppArmor(kind=AppArmorKind.LOCALHOST, name=name)


def load(parent: Path, directory: str, name: str, binary: bytes | None) -> Path:
    place = parent / "profiles" / directory
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    if binary is not None:
        (place / "raw_data").write_bytes(binary)
    return place


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """securityfs as a kernel shows it: special characters of names are replaced in those of directories."""
    policy = tmp_path / "policy"
    parent = load(policy, "usr.bin.man.1", "/usr/bin/man", b"of man")
    load(parent, "man_groff.2", "man_groff", b"of its child")
    load(policy, "man.3", "man", b"of another")
    load(policy, "spaced name.4", "spaced name", b"spaced")
    load(policy, "hidden.5", "hidden", None)
    load(policy, "huge.6", "huge", bytes(MAX_POLICY_BYTES + 1))
    (policy / "profiles" / "going.7").mkdir()  # its files have gone before it
    return policy


@pytest.mark.parametrize(
    ("name", "binary"),
    [
        ("/usr/bin/man", b"of man"),
        ("/usr/bin/man//man_groff", b"of its child"),
        ("man", b"of another"),
        ("spaced name", b"spaced"),
    ],
)
def test_localhost_profile_that_is_loaded_is_read(host: Path, name: str, binary: bytes) -> None:
    assert policy_for(local(name), Path("/nowhere"), host) == Policy(profile=name, binary=binary)
    assert profile_name(local(name)) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nonesuch", "not loaded"),
        ("man_groff", "not loaded"),
        ("man.3", "not loaded"),
        ("man//man_groff", "not loaded"),
        ("../profiles/man.3", "not loaded"),
        ("*", "not loaded"),
        ("man//", "not loaded"),
        ("hidden", "does not export its policy"),
        ("huge", "larger than"),
    ],
)
def test_unavailable_profile_is_rejected_with_reason(host: Path, name: str, problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem) as caught:
        policy_for(local(name), Path("/nowhere"), host)
    assert caught.value.field == "config.linux.security_context.apparmor.localhost_ref"


def test_localhost_profile_on_host_without_apparmor_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="this host's kernel has no AppArmor"):
        policy_for(local("man"), Path("/nowhere"), tmp_path / "policy")


def test_runtime_default_is_the_compiled_profile(tmp_path: Path) -> None:
    compiled = tmp_path / "apparmor"
    with pytest.raises(InvalidSpec, match="husk guest build") as caught:
        policy_for(DEFAULT, compiled)
    assert caught.value.field == "config.linux.security_context.apparmor.profile_type"
    compiled.write_bytes(b"compiled")
    assert policy_for(DEFAULT, compiled) == Policy(profile=NAME, binary=b"compiled")
    assert profile_name(DEFAULT) == NAME


def test_unconfined_reads_no_files() -> None:
    assert policy_for(AppArmor(), Path("/nowhere"), Path("/nowhere")) == UNCONFINED
    assert profile_name(AppArmor()) == "unconfined"


# ----------------------------------------------------------------------------------- compiling


async def test_default_profile_compiles_reproducibly(tmp_path: Path) -> None:
    policies = [
        await compile_default(apparmor.parser(), tmp_path / "none", tmp_path, print) for _ in range(2)
    ]
    assert policies[0] == policies[1]
    assert policies[0].startswith(b"\x04\x08\0version\0")  # aa_unpack of the kernel
    assert NAME.encode() in policies[0]


async def test_rules_of_default_profile_are_in_the_policy(tmp_path: Path) -> None:
    """A rule that the features do not include would be dropped, and the policy without it be the same."""
    policies = {PROFILE: await compile_policy(apparmor.parser(), PROFILE, tmp_path)}
    for rule in (line for line in PROFILE.splitlines() if line.startswith("  ") and line.endswith(",")):
        without = PROFILE.replace(f"{rule}\n", "")
        policies[without] = await compile_policy(apparmor.parser(), without, tmp_path)
    assert len(policies) > 10
    assert len(set(policies.values())) == len(policies)


async def test_invalid_profile_fails_the_build_with_reason(tmp_path: Path) -> None:
    with pytest.raises(packages.BuildFailed, match="syntax error"):
        await compile_policy(apparmor.parser(), "profile x { nonsense }", tmp_path)


async def test_build_without_parser_has_no_default_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(package: str) -> str:
        return ""

    monkeypatch.setattr(compiler, "WHERE", str(tmp_path))
    monkeypatch.setattr(compiler, "show", unknown)
    lines: list[str] = []
    assert await compile_default(None, tmp_path / "packages", tmp_path, lines.append) == b""
    assert len(lines) == 1
    assert "RuntimeDefault will be rejected" in lines[0]
    assert "apt-get update" in lines[0]


async def test_installed_parser_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "WHERE", str(apparmor.parser().parent))
    assert await find_parser(tmp_path / "packages", tmp_path, print) == apparmor.parser()
    assert not (tmp_path / "packages").exists()
