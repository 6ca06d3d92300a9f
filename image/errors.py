"""The errors of this package, one class for each thing that a caller can do about it.

Facts are in fields. A message is bounded and never holds a credential, a token or a query string (registries
put signatures there). Only `cri/errors.py` turns these into status codes.
"""

from __future__ import annotations

TEXT_LIMIT = 300


def bounded(text: str) -> str:
    """Return untrusted text as one line of at most TEXT_LIMIT printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * TEXT_LIMIT]).split())
    return line if len(line) <= TEXT_LIMIT else line[: TEXT_LIMIT - 3] + "..."


class ImageError(Exception):
    """Base of all errors of this package."""


class InvalidReference(ImageError):
    """The text is not an image reference."""

    def __init__(self, reference: str, problem: str) -> None:
        super().__init__(f"invalid image reference {bounded(reference)!r}: {problem}")
        self.reference = reference
        self.problem = problem


class ImageNotFound(ImageError):
    """No stored image has this name, digest or id."""

    def __init__(self, reference: str, problem: str = "not found in the store") -> None:
        super().__init__(f"image {bounded(reference)!r}: {problem}")
        self.reference = reference


class ImagePinned(ImageError):
    """The image is pinned by the configuration, and is not removed."""

    def __init__(self, reference: str, name: str, pattern: str) -> None:
        problem = (
            f"{name} is pinned by the pattern {pattern!r} of images.pinned, take it out to remove the image"
        )
        super().__init__(f"image {bounded(reference)!r}: {problem}")
        self.reference = reference
        self.pattern = pattern


class ManifestNotFound(ImageError):
    """The registry has no such image, or none for this platform."""

    def __init__(self, reference: str, host: str, detail: str = "manifest unknown") -> None:
        super().__init__(f"{bounded(reference)}: not found at {host}: {bounded(detail)}")
        self.reference = reference
        self.host = host
        self.detail = bounded(detail)


class Unauthorized(ImageError):
    """The registry refused the credentials, or wants some. Registries also answer so for a missing image."""

    def __init__(self, reference: str, host: str, status: int, detail: str = "") -> None:
        text = f"{bounded(reference)}: {host} refused access with {status}"
        super().__init__(text + (f": {bounded(detail)}" if detail else ""))
        self.reference = reference
        self.host = host
        self.status = status
        self.detail = bounded(detail)


class RegistryUnavailable(ImageError):
    """The registry cannot be reached or cannot serve now; a later retry may succeed.

    The text begins with the class's name, for which the kubelet has an event reason (its
    ErrRegistryUnavailable).
    """

    def __init__(self, host: str, what: str, problem: str, attempts: int = 1) -> None:
        tries = f" after {attempts} attempts" if attempts > 1 else ""
        super().__init__(f"RegistryUnavailable: {host}: {bounded(what)}: {bounded(problem)}{tries}")
        self.host = host
        self.what = what
        self.problem = bounded(problem)
        self.attempts = attempts


class ImageRefused(ImageError):
    """The trust policy of its registry does not allow the image.

    The text begins with a word for which the kubelet has an event reason (its ErrSignatureValidationFailed).
    """

    def __init__(self, reference: str, digest: str, problem: str) -> None:
        what = bounded(reference) if digest in reference else f"{bounded(reference)} ({digest})"
        super().__init__(f"SignatureValidationFailed: {what}: {bounded(problem)}")
        self.reference = reference
        self.digest = digest
        self.problem = bounded(problem)


class DigestMismatch(ImageError):
    """Content is not what was requested. `expected` and `actual` are digests or sizes in bytes."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(f"{what}: expected {bounded(expected)}, got {bounded(actual)}")
        self.what = what
        self.expected = expected
        self.actual = actual


class UnsupportedMedia(ImageError):
    """The image is of a kind that Husk does not support."""

    def __init__(self, what: str, media_type: str, problem: str) -> None:
        super().__init__(f"{what}: media type {bounded(media_type)!r}: {problem}")
        self.what = what
        self.media_type = media_type
        self.problem = problem


class ManifestInvalid(ImageError):
    """A manifest, index or configuration violates its specification or a limit."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{what}: {bounded(problem)}")
        self.what = what
        self.problem = bounded(problem)


class LayerRejected(ImageError):
    """A layer's archive is broken, forbidden or above a limit; nothing of it is kept. `path` is the entry."""

    def __init__(self, path: str, reason: str) -> None:
        where = f" at {bounded(path)!r}" if path else ""
        super().__init__(f"layer rejected{where}: {reason}")
        self.path = path
        self.reason = reason


class ArchiveInvalid(ImageError):
    """A file to import is not an image archive."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {bounded(problem)}")
        self.path = path
        self.problem = bounded(problem)


class DiskFull(ImageError):
    """The store's filesystem or quota has no space or inodes left; what was begun is undone."""

    def __init__(self, path: str, what: str, detail: str = "") -> None:
        text = f"no space left on the filesystem of {path} while {what}"
        super().__init__(text + (f": {detail}" if detail else ""))
        self.path = path
        self.what = what
        self.detail = detail


class PullDeadline(ImageError):
    """The pull took longer than the configured limit."""

    def __init__(self, reference: str, timeout_s: float) -> None:
        super().__init__(f"{bounded(reference)}: not pulled within {timeout_s:g} s")
        self.reference = reference
        self.timeout_s = timeout_s


class MirrorConfigInvalid(ImageError):
    """A hosts.toml cannot be used; names the file and the key."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class StorageFailed(ImageError):
    """A system call on the store failed, and not because of the image."""

    def __init__(self, path: str, what: str, errno: int, problem: str) -> None:
        super().__init__(f"{what}: {path}: {problem}")
        self.path = path
        self.what = what
        self.errno = errno
