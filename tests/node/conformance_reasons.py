"""Reasons why critest specs do not pass, by the beginning of their titles. All other specs must pass."""

from __future__ import annotations

# these skip themselves
SKIPPED = {
    "AppArmor / ": "the kernel of this host has no AppArmor, which critest checks first",
    "NRI / ": "Husk has no NRI socket to give critest",
}

# these fail
FAILED: dict[str, str] = {}


def reason_in(reasons: dict[str, str], title: str) -> str:
    """Return the reason listed for a spec's title, empty if there is none."""
    return next((reason for begin, reason in reasons.items() if title.startswith(begin)), "")
