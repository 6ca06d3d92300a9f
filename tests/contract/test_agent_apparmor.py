"""AppArmor as far as it goes without a VM; tests/vm/test_apparmor.py does the rest.

An agent on a developer's machine leaves that machine's kernel alone, and a profile that cannot be entered
keeps the program from running.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.errors import GuestError
from tests.kit.agent import Guest, process

ABSENT = "husk-test-absent"


def reason() -> str:
    has_apparmor = Path("/proc/self/attr/apparmor").exists()
    return "No such file or directory" if has_apparmor else "the guest's kernel has no AppArmor"


async def test_a_profile_that_is_not_there_keeps_a_container_from_starting(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start([], process=process(["sleep", "100"], apparmor=ABSENT))
    assert caught.value.step == "apparmor"
    assert str(caught.value) == f"apparmor: {ABSENT}: {reason()}"


async def test_or_an_exec(guest: Guest) -> None:
    id = await guest.start(["sleep", "100"])
    with pytest.raises(GuestError) as caught:
        await guest.exec(id, ["true"], apparmor=ABSENT)
    assert (caught.value.step, ABSENT in str(caught.value)) == ("apparmor", True)
    assert (await guest.exec(id, ["true"]))[0] == 0


async def test_a_name_of_any_length_is_answered(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start([], process=process(["true"], apparmor="x" * 5000))
    assert caught.value.step == "apparmor"


async def test_policy_is_for_the_kernel_of_a_vm(guest: Guest) -> None:
    with pytest.raises(GuestError) as caught:
        await guest.start(["true"], apparmor_policy=b"policy")
    assert (caught.value.step, caught.value.errno) == ("apparmor", 1)
