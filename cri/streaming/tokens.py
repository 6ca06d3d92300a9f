"""Tokens: a session that a gRPC call allowed, to be redeemed once over HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from cri.streaming.session import SessionOptions

LIFETIME_S = 60.0
PENDING_MAX = 1000


class TooManyTokens(Exception):
    """PENDING_MAX sessions were requested and not started yet, so no more tokens are issued for now."""

    def __init__(self) -> None:
        super().__init__(
            f"{PENDING_MAX} streaming sessions were requested and not started; "
            f"each request expires after {LIFETIME_S:g} s, try again later"
        )


class Tokens:
    """Issued tokens that were neither redeemed nor expired. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: dict[str, tuple[float, SessionOptions]] = {}  # oldest first

    def issue(self, options: SessionOptions) -> str:
        """Return a new token for a session, valid for LIFETIME_S seconds. Raises TooManyTokens."""
        self._forget_expired()
        if len(self._pending) >= PENDING_MAX:
            raise TooManyTokens
        token = secrets.token_urlsafe(24)
        self._pending[token] = (self._clock() + LIFETIME_S, options)
        return token

    def redeem(self, token: str) -> SessionOptions | None:
        """Return the session of a token, the first time only; None if it is unknown, used or expired."""
        self._forget_expired()
        found = self._pending.pop(token, None)
        return found[1] if found else None

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._pending:
            oldest = next(iter(self._pending))
            if self._pending[oldest][0] > now:
                return
            del self._pending[oldest]
