"""The trust policy of an image's name, and its check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from image.budget import Limits
from image.errors import ImageRefused, InvalidReference
from image.manifest import Descriptor
from image.reference import Reference, parse
from image.trust import cosign, keys, verifier
from image.trust.cosign import SignatureSource

EVERYWHERE = "*"  # the prefix of all names


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Who decides about the images of one prefix.

    `none`: all may be pulled; `refuse`: none may; `key`: those signed with one of `keys`, files with a PEM
    public key each; `verifier`: those that the program `verifier` accepts. With `match` "repository" a
    signature must also name the repository that is pulled from, as it does not after a copy to another
    registry.
    """

    policy: Literal["none", "refuse", "key", "verifier"] = "none"
    keys: tuple[str, ...] = ()
    match: Literal["digest", "repository"] = "digest"
    verifier: str = ""


def check_prefix(prefix: str) -> str:
    """Return what is wrong with a prefix of image names; empty for a good one."""
    if prefix == EVERYWHERE:
        return ""
    try:
        whole = parse(f"{prefix}/x").name == f"{prefix}/x"
    except InvalidReference as error:
        return error.problem
    return "" if whole else "does not begin with a registry"


def check_policy(policy: Policy) -> tuple[str, str]:
    """Return the key that is wrong and what is wrong with it; two empty strings if nothing. Reads files."""
    needed = {"key": "keys", "verifier": "verifier"}.get(policy.policy, "")
    for field in ("keys", "verifier"):
        if (field == needed) != bool(getattr(policy, field)):
            with_policy = f'policy = "{policy.policy}"'
            return (
                field,
                f"is needed with {with_policy}" if field == needed else f"has no use with {with_policy}",
            )
    for n, path in enumerate(policy.keys):
        try:
            keys.load(Path(path))
        except keys.KeyUnusable as error:
            return f"keys[{n}]", str(error)
    if policy.verifier and (problem := verifier.find_problem(policy.verifier)):
        return "verifier", problem
    return "", ""


class Trust:
    """The policies of one node, by prefix: "registry.example.com", "registry.example.com/team", or "*"."""

    def __init__(self, policies: Mapping[str, Policy], limits: Limits | None = None) -> None:
        self._policies = policies
        self._limits = limits or Limits()

    def find(self, reference: Reference) -> Policy:
        """Return the policy of the longest prefix that ends at a slash of the name or at its end."""
        parts = reference.name.split("/")
        for length in range(len(parts), 0, -1):
            if policy := self._policies.get("/".join(parts[:length])):
                return policy
        return self._policies.get(EVERYWHERE, Policy())

    async def check(self, source: SignatureSource, reference: Reference, target: Descriptor) -> None:
        """Return if the image whose manifest or index this is may be pulled.

        Raises ImageRefused, and what `source` raises when it cannot be asked.
        """
        policy = self.find(reference)
        try:
            if policy.policy == "refuse":
                raise cosign.Refused("the policy of its prefix is to refuse")
            if policy.policy == "key":
                await cosign.check(source, reference, target.digest, policy.keys, policy.match, self._limits)
            elif policy.policy == "verifier":
                await verifier.check(policy.verifier, reference, target)
        except cosign.Refused as error:
            raise ImageRefused(str(reference), target.digest, str(error)) from error
