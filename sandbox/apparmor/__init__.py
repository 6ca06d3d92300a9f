"""AppArmor: from what a client asks for to the policy that the guest's kernel loads.

    loaded      profiles that are loaded in the host's kernel (Localhost)
    profile     the RuntimeDefault profile
    compiler    a profile's text to policy, by apparmor_parser

A profile travels as its compiled policy, in the message that starts the container; the agent loads it
into the guest's kernel, which enforces it. So Localhost takes a host whose kernel has AppArmor, to load
profiles into, and both take a guest whose kernel has it. Nothing is kept here.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.apparmor.loaded import HOST_POLICY, read_policy
from sandbox.apparmor.profile import NAME, UNCONFINED, Policy
from sandbox.errors import InvalidSpec
from sandbox.spec import AppArmor, AppArmorKind

__all__ = ["Policy", "policy_for", "profile_name"]

_FIELD = "config.linux.security_context.apparmor"


def policy_for(wanted: AppArmor, default: Path, host: Path = HOST_POLICY) -> Policy:
    """What a container is given; an empty one when it is unconfined. `default` holds the compiled
    RuntimeDefault profile, where there is one.

    Reads files, so call it in a thread. Raises InvalidSpec: the profile cannot be had, and why.
    """
    match wanted.kind:
        case AppArmorKind.UNCONFINED:
            return UNCONFINED
        case AppArmorKind.LOCALHOST:
            return Policy(profile=wanted.name, binary=read_policy(wanted.name, host))
    try:
        return Policy(profile=NAME, binary=default.read_bytes())
    except FileNotFoundError as error:
        raise InvalidSpec(
            f"{_FIELD}.profile_type",
            "RuntimeDefault: the guest image was built without AppArmor's profile, for want of its parser",
            "Unconfined, or RuntimeDefault after a `husk guest build` where apt knows the package apparmor",
        ) from error


def profile_name(wanted: AppArmor) -> str:
    """The profile's name in the guest."""
    if wanted.kind is AppArmorKind.UNCONFINED:
        return "unconfined"
    return wanted.name if wanted.kind is AppArmorKind.LOCALHOST else NAME
