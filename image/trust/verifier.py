"""An external program that decides whether an image may be pulled, called as containerd calls its verifiers.

    PROGRAM -name REFERENCE -digest DIGEST -stdin-media-type application/vnd.oci.descriptor.v1+json

On its standard input is the OCI descriptor of the manifest or index. Exit status 0 accepts the image; any
other, an end by a signal and a run of more than TIMEOUT_S refuse it. What it writes to standard output is the
reason.
Source: containerd, docs/image-verification.md.
"""

from __future__ import annotations

import os
import stat

import msgspec

from image.errors import bounded
from image.manifest import Descriptor
from image.reference import Reference
from image.trust.cosign import Refused
from sandbox.host import process

TIMEOUT_S = 10.0
OUTPUT_LIMIT = 16 << 10
DESCRIPTOR = "application/vnd.oci.descriptor.v1+json"


def find_problem(program: str) -> str:
    """Return why a file cannot be the verifier; empty if it can. Blocking."""
    try:
        mode = os.stat(program).st_mode  # noqa: PTH116
    except OSError as error:
        return f"{program}: {error.strerror}"
    if not stat.S_ISREG(mode) or not os.access(program, os.X_OK):
        return f"{program}: is not a program"
    return ""


async def check(program: str, reference: Reference, target: Descriptor) -> None:
    """Return if the program accepts the image. Raises Refused."""
    described = {"mediaType": target.media_type, "digest": target.digest, "size": target.size}
    arguments = ("-name", str(reference), "-digest", target.digest, "-stdin-media-type", DESCRIPTOR)
    try:
        done = await process.run(
            (program, *arguments),
            timeout_s=TIMEOUT_S,
            max_output=OUTPUT_LIMIT,
            stdin=msgspec.json.encode(described),
        )
    except process.DeadlineExceeded as error:
        raise Refused(f"verifier {program} did not decide within {TIMEOUT_S:g} s") from error
    except OSError as error:
        raise Refused(f"verifier {program} cannot be run: {error.strerror}") from error
    if done.status != 0:
        said = (done.stdout.strip() or done.stderr.strip()).decode("utf-8", "replace")
        raise Refused(
            f"verifier {program} ended with status {done.status}" + (f": {bounded(said)}" if said else "")
        )
