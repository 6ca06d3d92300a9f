"""docs/architecture.md names only what exists, and its lists of files are what the code says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from sandbox.engine import ContainerRuntime, Control, PodRuntime, Sessions
from sandbox.records import VERSION
from sandbox.vmm.drivers import find_hypervisors

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
CODE_PATH = re.compile(r"`((?:cri|sandbox|network|image|tests|deploy|docs|examples)/[A-Za-z0-9_./-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
LISTS = ("cri-field", "rpc", "guest-message", "hypervisor", "rootfs-store")
MOST_PLACES_FOR_DISKS = 5


@cache
def page() -> str:
    return (ROOT / "docs/architecture.md").read_text()


def section(marker: str) -> str:
    """The text from a marker to the next heading or end marker."""
    _, found, rest = page().partition(f"<!-- {marker} -->")
    assert found, f"docs/architecture.md has no marker {marker!r}"
    return re.split(r"\n#+ |<!-- end -->", rest)[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_paths_and_links_exist(path: Path) -> None:
    text = path.read_text()
    missing = [name for name in CODE_PATH.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in LINK.findall(text) if not (path.parent / name).exists()]
    assert missing == []


@pytest.mark.parametrize("name", LISTS)
def test_list_of_files_is_not_empty(name: str) -> None:
    assert len(CODE_PATH.findall(section(f"files: {name}"))) >= 3


def test_hypervisor_list_is_the_folder_of_a_driver_that_is_found() -> None:
    named = {Path(name) for name in CODE_PATH.findall(section("files: hypervisor"))}
    driver = Path("sandbox/vmm/qemu")
    assert driver.name in find_hypervisors()
    assert {driver / "__init__.py", driver / "driver.py", driver / "machine.py", driver / "host.py"} <= named


def test_driver_that_exists_only_in_tests_is_named_nowhere_else() -> None:
    """So that a driver needs no edit outside its folder and its kit."""
    sources = [*ROOT.glob("sandbox/**/*.py"), *ROOT.glob("cri/**/*.py"), ROOT / "pyproject.toml"]
    assert not [path for path in sources if "tests.drivers" in path.read_text()]


def test_places_to_change_for_a_store_of_disks_are_at_most_five() -> None:
    places = re.findall(r"^\d+\. `", section("count: rootfs-disk"), re.MULTILINE)
    assert 0 < len(places) <= MOST_PLACES_FOR_DISKS


def test_places_that_distinguish_disks_from_trees_are_listed_and_at_most_five() -> None:
    listed = set(CODE_PATH.findall(section("kinds: rootfs")))
    kinds = re.compile(r"\b(?:HostTree|Disk)\b")
    sources = [*ROOT.glob("sandbox/**/*.py"), *ROOT.glob("cri/**/*.py"), *ROOT.glob("network/**/*.py")]
    found = {str(path.relative_to(ROOT)) for path in sources if kinds.search(path.read_text())}
    assert found == listed
    assert len(listed) <= MOST_PLACES_FOR_DISKS


@pytest.mark.parametrize("protocol", [PodRuntime, ContainerRuntime, Sessions, Control])
def test_engine_protocol_has_at_most_five_methods(protocol: type) -> None:
    """And attributes, as far as the page promises: four protocols of at most five methods."""
    methods = [name for name, value in vars(protocol).items() if name[0] != "_" and callable(value)]
    assert 1 <= len(methods) <= 5


def test_record_version_on_the_page_is_that_of_the_code() -> None:
    assert f"of the format, now {VERSION}." in page()


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


def test_contributing_lists_every_kind_of_tests() -> None:
    listed = re.findall(r"^\| `([a-z]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    accepted = re.search(r"^    (lint \| .*)\) ;;$", (ROOT / "tests/run").read_text(), re.MULTILINE)
    assert accepted is not None
    assert set(listed) | {"golden"} == set(accepted[1].split(" | "))
