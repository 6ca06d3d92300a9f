"""Which images may be pulled: one policy for each prefix of image names, checked before any layer is fetched.

    policies     the policy of a reference, and the check itself
    cosign       signatures that lie beside the image in its registry, in cosign's two forms
    keys         public keys; the only importer of `cryptography`
    verifier     an external program that decides, called as containerd's image verifiers are

What is checked is the digest that the tag had at that moment, and the manifest with this digest is what is
pulled. Imported archives are not checked: only root may import.
"""

from image.trust.policies import Policy, Trust

__all__ = ["Policy", "Trust"]
