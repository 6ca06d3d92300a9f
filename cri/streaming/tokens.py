"""Tokens: a wish that was allowed over gRPC, to be redeemed once over HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from cri.streaming.session import SessionOptions

LIFETIME_S = 60.0
MOST = 1000


class TooManyTokens(Exception):
    """So many sessions were asked for and not begun that no more are handed out for now."""

    def __init__(self) -> None:
        super().__init__(f"{MOST} streaming sessions were asked for and not begun; try again later")


class Tokens:
    """`clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: dict[str, tuple[float, SessionOptions]] = {}  # oldest first

    def issue(self, wish: SessionOptions) -> str:
        """Raises TooManyTokens."""
        self._forget_expired()
        if len(self._pending) >= MOST:
            raise TooManyTokens
        token = secrets.token_urlsafe(24)
        self._pending[token] = (self._clock() + LIFETIME_S, wish)
        return token

    def redeem(self, token: str) -> SessionOptions | None:
        """What the token stands for, the first time and in time; else None."""
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
