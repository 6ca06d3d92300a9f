"""Public keys of signatures. `cryptography`, of the extra `husk[trust]`, is imported here alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Verify = Callable[[bytes, bytes], bool]  # (signature, message)

KEY_LIMIT = 64 << 10  # bytes of a key's file


class KeyUnusable(Exception):
    """A key's file cannot be used; the text names the file and the reason."""


def load(path: Path) -> Verify:
    """Return the check of a signature by the public key in a PEM file (SubjectPublicKeyInfo).

    ECDSA and RSA (PKCS #1 v1.5) over SHA-256, which cosign uses for keys, ECDSA also over the hash of the
    curve's size; Ed25519. Blocking. Raises KeyUnusable.
    """
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise KeyUnusable("keys need the Python package cryptography: install husk[trust]") from error
    try:
        with path.open("rb") as file:
            key = load_pem_public_key(file.read(KEY_LIMIT))
    except OSError as error:
        raise KeyUnusable(f"{path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnusable(f"{path}: is not a public key in PEM form") from error

    def check(signature: bytes, message: bytes) -> None:
        if isinstance(key, ec.EllipticCurvePublicKey):
            own = {384: hashes.SHA384(), 521: hashes.SHA512()}.get(key.curve.key_size, hashes.SHA256())
            try:
                key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
            except InvalidSignature:
                key.verify(signature, message, ec.ECDSA(own))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)

    def verify(signature: bytes, message: bytes) -> bool:
        try:
            check(signature, message)
        except InvalidSignature:
            return False
        return True

    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise KeyUnusable(f"{path}: is a key of another kind; accepted: ECDSA, RSA, Ed25519")
    return verify
