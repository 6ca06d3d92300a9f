"""AppArmor without a VM: a profile that cannot be entered fails the start or exec.

In standalone mode the agent loads no policy into the machine's kernel. The rest is in
tests/vm/test_apparmor.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.errors import GuestError
from tests.kit.agent import Guest, process

ABSENT = "husk-test-absent"


def reason() -> str:
    """Why a missing profile cannot be entered on this machine."""
    has_apparmor = Path("/proc/self/attr/apparmor").exists()
    return "No such file or directory" if has_apparmor else "the guest's kernel has no AppArmor"


async def test_start_with_missing_profile_fails(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start([], process=process(["sleep", "100"], apparmor=ABSENT))
    assert caught.value.step == "apparmor"
    assert str(caught.value) == f"apparmor: {ABSENT}: {reason()}"


async def test_exec_with_missing_profile_fails(guest: Guest) -> None:
    id = await guest.start(["sleep", "100"])
    with pytest.raises(GuestError) as caught:
        await guest.exec(id, ["true"], apparmor=ABSENT)
    assert (caught.value.step, ABSENT in str(caught.value)) == ("apparmor", True)
    assert (await guest.exec(id, ["true"]))[0] == 0


async def test_start_with_very_long_profile_name_fails(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start([], process=process(["true"], apparmor="x" * 5000))
    assert caught.value.step == "apparmor"


async def test_start_with_policy_in_standalone_mode_is_refused(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start(["true"], apparmor_policy=b"policy")
    assert (caught.value.step, caught.value.errno) == ("apparmor", 1)
