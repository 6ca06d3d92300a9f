"""Profiles that are loaded in the host's kernel, as its securityfs shows them.

policy/profiles/DIRECTORY/name            the profile's name; DIRECTORY is made of it and a number
policy/profiles/DIRECTORY/raw_data        the policy with which it was loaded, not compressed
policy/profiles/DIRECTORY/profiles/       its children: the profile a//b is b in the directory of a
"""

from __future__ import annotations

from pathlib import Path

from sandbox.errors import InvalidSpec

HOST_POLICY = Path("/sys/kernel/security/apparmor/policy")
# A policy goes to the guest in one frame of 4 MiB, with the rest of the container's plan.
MAX_POLICY_BYTES = 3 << 20
_FIELD = "config.linux.security_context.apparmor.localhost_ref"


def read_policy(name: str, policy: Path = HOST_POLICY) -> bytes:
    """Return the policy with which the profile was loaded; `name` may name a child as "parent//child".

    Blocking. Raises InvalidSpec when the profile is not loaded or its policy cannot be read.
    """
    if not policy.is_dir():
        raise InvalidSpec(
            _FIELD,
            f"{name!r}: this host's kernel has no AppArmor to load a profile into",
            "profile_type Unconfined or RuntimeDefault",
        )
    place = policy
    for part in name.split("//"):
        found = _find(part, place / "profiles")
        if found is None:
            raise InvalidSpec(
                _FIELD,
                f"{name!r} is not loaded in this host's kernel",
                "a profile that aa-status(8) lists",
            )
        place = found
    return _read(name, place / "raw_data")


def _find(name: str, profiles: Path) -> Path | None:
    for directory in sorted(profiles.glob("*")):
        try:
            if (directory / "name").read_text(errors="surrogateescape").removesuffix("\n") == name:
                return directory
        except FileNotFoundError:  # unloaded since
            continue
    return None


def _read(name: str, raw_data: Path) -> bytes:
    try:
        with raw_data.open("rb") as file:
            content = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        # CONFIG_SECURITY_APPARMOR_EXPORT_BINARY, apparmor.export_binary
        raise InvalidSpec(
            _FIELD,
            f"{name!r}: this host's kernel does not export its policy ({error.strerror})",
            "a kernel that exports it (apparmor.export_binary=1)",
        ) from error
    if len(content) > MAX_POLICY_BYTES:
        raise InvalidSpec(_FIELD, f"{name!r}: its policy is larger than {MAX_POLICY_BYTES} bytes")
    return content
