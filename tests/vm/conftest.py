"""Every test of this folder boots real VMs, and leaves nothing behind."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def leave_nothing(request: pytest.FixtureRequest) -> None:
    """Tests that take a daemon of the module are followed by the look for leaks."""
    if "daemon" in request.fixturenames:
        request.getfixturevalue("tidy")
