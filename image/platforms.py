"""Platform names, and which manifest of an index runs on this host. Pure.

The names are Go's GOOS and GOARCH (image-spec, image-index.md). Builders also write uname(2)'s names and
other letter cases, which containerd (platforms/database.go) normalizes in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

from image.manifest import INDEXES, MANIFESTS, Descriptor, ImageIndex, Platform

_OS = {"macos": "darwin"}
_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm", "armel": "arm", "armv6l": "arm",
    "armv7l": "arm", "i386": "386", "i686": "386",
}  # fmt: skip
_IMPLIED_VARIANTS = {"armhf": "v7", "armel": "v6", "armv6l": "v6", "armv7l": "v7"}
_SHOWN = 32  # characters of a name in errors
_BASELINES = {"amd64": 1, "arm64": 8, "arm": 7}


def normalize(platform: Platform) -> Platform:
    """Return the platform with Go's names in lower case; empty fields stay empty."""
    os, architecture = platform.os.lower(), platform.architecture.lower()
    variant = platform.variant.lower() or _IMPLIED_VARIANTS.get(architecture, "")
    return Platform(
        os=_OS.get(os, os),
        architecture=_ARCHITECTURES.get(architecture, architecture),
        variant=f"v{variant}" if variant.isdecimal() else variant,
    )


def host_platform(machine: str) -> Platform:
    """Return the platform of this host; `machine` is platform.machine() (uname(2))."""
    found = normalize(Platform(os="linux", architecture=machine))
    baseline = _BASELINES.get(found.architecture)
    if found.variant or baseline is None or found.architecture == "amd64":
        return found
    return Platform(os=found.os, architecture=found.architecture, variant=f"v{baseline}")


def is_for(platform: Platform, wanted: Platform) -> bool:
    """Return whether an image for `platform` is for the OS and architecture `wanted`; empty fields match."""
    found = normalize(platform)
    return (found.os or wanted.os, found.architecture or wanted.architecture) == (
        wanted.os,
        wanted.architecture,
    )


def describe(platform: Platform) -> str:
    """Return "os/architecture" for an error, cut to a length that can be read."""
    return f"{platform.os[:_SHOWN]}/{platform.architecture[:_SHOWN]}"


def candidates(index: ImageIndex, wanted: Platform) -> Sequence[Descriptor]:
    """Return the manifests of an index that may be for this platform, the best first.

    Of amd64 and arm variants the highest wins that does not exceed `wanted`; of equal entries the first
    (image-index.md). Entries without a platform follow, in their order: only their configurations say what
    they are for.
    """
    scored = [(_score(entry, wanted), entry) for entry in index.manifests]
    able = [each for each in scored if each[0] >= 0]
    return [entry for _, entry in sorted(able, key=lambda each: -each[0])]  # stable


def _score(entry: Descriptor, wanted: Platform) -> int:
    """Return how well an entry matches: 0 without a platform, -1 for another one."""
    if entry.media_type and entry.media_type not in MANIFESTS + INDEXES:
        return -1
    if not has_platform(entry):
        return 0
    assert entry.platform is not None
    platform = normalize(entry.platform)
    if (platform.os, platform.architecture) != (wanted.os, wanted.architecture):
        return -1
    offered, limit = _level(platform.variant, wanted), _level(wanted.variant, wanted)
    return 1 + offered if offered <= limit else -1


def has_platform(entry: Descriptor) -> bool:
    """Return whether an index entry says what it is for."""
    return entry.platform is not None and bool(entry.platform.os or entry.platform.architecture)


def _level(variant: str, wanted: Platform) -> int:
    """Return the number of a variant "v1", "v2"...; of the architecture's baseline if there is none."""
    number = variant.removeprefix("v")
    baseline = _BASELINES.get(wanted.architecture, 0)
    return int(number) if number.isdecimal() and len(number) < 3 else baseline
