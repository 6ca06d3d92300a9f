"""Why a critest spec does not pass, by how its title begins: the only ones that may not."""

from __future__ import annotations

# these skip themselves
SKIPPED = {
    "AppArmor / ": "the kernel of this host has no AppArmor, which critest looks at first",
    "NRI / ": "Husk has no NRI socket to give critest",
}

# these fail
FAILED: dict[str, str] = {}


def reason_in(reasons: dict[str, str], title: str) -> str:
    return next((reason for begin, reason in reasons.items() if title.startswith(begin)), "")
