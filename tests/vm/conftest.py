"""Every test of this folder boots real VMs and leaves nothing."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def leave_nothing(request: pytest.FixtureRequest) -> None:
    """Check for leaks after each test that uses the module's daemon."""
    if "daemon" in request.fixturenames:
        request.getfixturevalue("tidy")
