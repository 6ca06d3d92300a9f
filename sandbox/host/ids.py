"""The range of user and group ids. Pure."""

from __future__ import annotations

# (uid_t) -1 means "leave it as it is" to chown(2) and setresuid(2), so the greatest id is the one below.
ID_MAX = 2**32 - 2
