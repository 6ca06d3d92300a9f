"""KVM on any host: the daemon in a VM whose emulated processor supports virtualisation.

The VM boots once. Each test here reports the result of the test of the same name inside (`inside.py`, and the
contract tests of the vsock transport, whose loopback the host's kernel may lack).
"""

from __future__ import annotations

import ast
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

TIMEOUT_S = 420  # it takes about 100
TREE = Path(__file__).resolve().parents[2]
TRANSPORT = TREE / "tests/contract/test_transport.py"
# the tests of the contract that run over every transport, here over vsock
VSOCK = tuple(
    f"{each.name}[vsock]"
    for each in ast.parse(TRANSPORT.read_text()).body
    if isinstance(each, ast.AsyncFunctionDef)
    and any("SCHEMES" in ast.unparse(d) for d in each.decorator_list)
)
PROBLEMS = ("failure", "error", "skipped")
NAMES = (*(name for name in vars(inside) if name.startswith("test_")), *VSOCK)

pytestmark = [pytest.mark.nested, pytest.mark.timeout(TIMEOUT_S + 60)]


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
def problems() -> Mapping[str, str]:
    """Run the tests inside, and return what went wrong by test; empty for those that passed."""
    assert TREE.stat().st_dev == Path("/").stat().st_dev, "the outer VM sees only the root's file system"
    apparmor.parser()  # fills the cache, as there is no network inside
    shared = scratch_dir("nested")
    program = [sys.executable, "-m", "tests.nested.outer", str(shared), str(TIMEOUT_S), *command()]
    done = subprocess.run(program, cwd=TREE, capture_output=True, text=True, check=False)
    results = shared / "results.xml"
    texts = [
        path.read_text(errors="replace") for path in (shared / "output", shared / "evidence") if path.exists()
    ]
    assert results.exists(), "\n".join([*texts, done.stdout, done.stderr])
    found: dict[str, str] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        reasons = [f"{each.get('message')}\n{each.text}" for each in case if each.tag in PROBLEMS]
        found[str(case.get("name"))] = "\n".join([found.get(str(case.get("name")), ""), *reasons]).strip()
    if any(found.values()):
        print(*texts, sep="\n")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_inside_outer_vm_passes(problems: Mapping[str, str], name: str) -> None:
    if problem := problems.get(name, "it did not run"):
        pytest.fail(" ".join(problem.split())[:1000], pytrace=False)
