"""Read images from a registry: OCI distribution-spec 1.1 and Docker Registry HTTP API v2, pull only.

    client     Registry: the hosts configured for one repository, asked in order
    endpoint   one host: manifests and blobs, redirects
    resume     a blob's byte stream: Range requests
    rate       the least rate at which a blob must arrive
    retry      retries with exponential backoff and Retry-After
    challenge  WWW-Authenticate headers
    token      the Authorization header of one host; the bearer token exchange
    proxy      HTTPS_PROXY, NO_PROXY
    transport  connections, TLS, the fallback to plain HTTP on loopback; the only user of the HTTP library
    errors     error responses as ImageError or TemporaryFailure, with secrets removed
    timing     all timeouts and retry limits

Every response is bounded in size and every wait in time. Text that a server sends reaches an error only
shortened and with the pull's own credentials removed.
"""

from __future__ import annotations

from image.registry.client import Registry
from image.registry.timing import Timing

__all__ = ["Registry", "Timing"]
