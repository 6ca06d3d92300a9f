"""AppArmor: from a client's profile type to the policy that the guest's kernel loads.

    loaded      profiles that are loaded in the host's kernel (Localhost)
    profile     the RuntimeDefault profile, which `guest_image.apparmor` compiles at build time

A profile is sent as its compiled policy, in the request that starts the container; the agent loads it into
the guest's kernel, which enforces it. So Localhost needs AppArmor in the host's kernel, where the profile
is loaded, and both need it in the guest's. No state is kept here.
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
    """Return a container's policy; an empty one when it is unconfined.

    `default` is the file of the compiled RuntimeDefault profile, which need not exist. Blocking. Raises
    InvalidSpec with the reason when the profile is not available.
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
            "RuntimeDefault: the guest image was built without the profile, as there was no apparmor_parser",
            "Unconfined, or RuntimeDefault after a `husk guest build` where apt knows the package apparmor",
        ) from error


def profile_name(wanted: AppArmor) -> str:
    """Return the profile's name in the guest; "unconfined" for none."""
    if wanted.kind is AppArmorKind.UNCONFINED:
        return "unconfined"
    return wanted.name if wanted.kind is AppArmorKind.LOCALHOST else NAME
