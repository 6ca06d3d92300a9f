"""KVM for real, on any host: the daemon in a VM whose emulated processor can run VMs itself.

One boot serves all; each test here is the verdict of the test of the same name in there (`inside.py`, and the
contract of the vsock transport, whose loopback the machine's own kernel may lack).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.kit import apparmor, debian
from tests.kit.scratch import scratch_dir
from tests.nested import inside

DEADLINE_S = 420  # it takes about 100
TREE = Path(__file__).resolve().parents[2]
VSOCK = tuple(
    f"test_{deed}[vsock]"
    for deed in ("bytes_pass_both_ways", "a_client_talks_over_it", "nobody_there_is_unreachable")
)
PROBLEMS = ("failure", "error", "skipped")
PROMISES = (*(name for name in vars(inside) if name.startswith("test_")), *VSOCK)

pytestmark = [pytest.mark.nested, pytest.mark.timeout(DEADLINE_S + 60)]


def command() -> list[str]:
    """pytest inside, with scratch directories in its own memory."""
    settings = {
        "HUSK_TEST_ROOT": "/tmp/hk",
        "HUSK_TEST_GUEST": os.environ["HUSK_TEST_GUEST"],
        "XDG_CACHE_HOME": str(debian.cache_directory().parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    transport = "tests/contract/test_transport.py"
    wanted = ["tests/nested/inside.py", *(f"{transport}::{name}" for name in VSOCK)]
    options = [
        "-p",
        "no:cacheprovider",
        "--timeout=300",
        "--junitxml=/nested/results.xml",
        "--basetemp=/tmp/t",
    ]
    return [
        "env",
        *(f"{name}={value}" for name, value in settings.items()),
        *(sys.executable, "-m", "pytest", *options, *wanted),
    ]


@pytest.fixture(scope="module")
def verdicts() -> Mapping[str, str]:
    """By the test's name what went wrong; nothing for those that passed."""
    assert TREE.stat().st_dev == Path("/").stat().st_dev, "the outer VM sees only the root's file system"
    apparmor.parser()  # from then on it is in the cache: there is no network inside
    shared = scratch_dir("nested")
    program = [sys.executable, "-m", "tests.nested.outer", str(shared), str(DEADLINE_S), *command()]
    done = subprocess.run(program, cwd=TREE, capture_output=True, text=True, check=False)
    output, results = shared / "output", shared / "results.xml"
    # the daemon's log and the guests' consoles are in it when a test there has failed
    told = output.read_text(errors="replace") if output.exists() else ""
    assert results.exists(), f"{told}\n{done.stdout}\n{done.stderr}"
    found: dict[str, str] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        problems = [f"{each.get('message')}\n{each.text}" for each in case if each.tag in PROBLEMS]
        found[str(case.get("name"))] = "\n".join([found.get(str(case.get("name")), ""), *problems]).strip()
    return found


@pytest.mark.parametrize("promise", PROMISES)
def test_under_kvm(verdicts: Mapping[str, str], promise: str) -> None:
    assert verdicts.get(promise, "it did not run") == ""
