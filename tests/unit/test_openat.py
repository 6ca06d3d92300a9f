"""Mount points are created in a root filesystem whose symbolic links are an attacker's."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.host.openat import make_beneath
from sandbox.plan.values import ContainerPlan, FilePlan, Make, MountPlan, ProcessPlan
from sandbox.steps.container import make_mount_points

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    return root


@pytest.fixture(autouse=True)
def _strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def names(tmp_path: Path) -> set[str]:
    return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}


def test_file_and_directory_are_created_with_missing_parents(root: Path) -> None:
    make_beneath(root, "/etc/hosts", directory=False)
    make_beneath(root, "/var/run/secrets/token", directory=True)
    assert (root / "etc/hosts").stat().st_mode & 0o777 == 0o644
    assert all((root / path).stat().st_mode & 0o777 == 0o755 for path in ("var", "var/run/secrets/token"))


def test_existing_file_is_unchanged(root: Path) -> None:
    (root / "etc/hosts").write_text("mine\n")
    for directory in (False, True):
        make_beneath(root, "/etc/hosts", directory=directory)
    assert (root / "etc/hosts").read_text() == "mine\n"


def test_link_is_followed_within_the_root(root: Path, tmp_path: Path) -> None:
    (root / "var").symlink_to("/private")
    (root / "private").mkdir()
    (root / "up").symlink_to("../../..")
    make_beneath(root, "/var/run", directory=True)
    make_beneath(root, "/up/made", directory=True)
    assert names(tmp_path) == {
        "root",
        *(f"root/{name}" for name in ["etc", "var", "private", "private/run", "up", "made"]),
    }


@pytest.mark.parametrize("target", ["/nowhere", "../../outside", "loop"])
def test_dangling_link_is_left_alone(root: Path, tmp_path: Path, target: str) -> None:
    (root / "loop").symlink_to(target)
    before = names(tmp_path)
    make_beneath(root, "/loop", directory=False)
    make_beneath(root, "/loop/below", directory=True)
    assert names(tmp_path) == before


def test_file_in_place_of_a_parent_is_left_for_the_guest_to_report(root: Path) -> None:
    (root / "etc/file").touch()
    make_beneath(root, "/etc/file/below", directory=True)
    assert (root / "etc/file").is_file()


def test_mount_point_below_another_mount_is_not_created(root: Path) -> None:
    made_at = {
        "/dev": Make.DIRECTORY,
        "/dev/shm": Make.DIRECTORY,
        "/sys/fs/cgroup": Make.NOTHING,
        "/data/one": Make.FILE,
    }
    plan = ContainerPlan(
        id="c",
        rootfs="/",
        process=ProcessPlan(),
        mounts=tuple(MountPlan(source="", target=target, make=make) for target, make in made_at.items()),
        files=tuple(FilePlan(path=path, content=b"", mode=0o644) for path in ("/etc/hostname", "/dev/note")),
    )
    make_mount_points(root, plan)
    made = {str(path.relative_to(root)) for path in root.rglob("*")}
    assert made == {"dev", "data", "data/one", "etc", "etc/hostname"}
    assert (root / "data/one").is_file()


def test_directory_replaced_by_a_link_while_it_is_made_leaves_the_target_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    mkdir = os.mkdir

    def replaced(name: str, *, dir_fd: int) -> None:
        """Do what a guest may do the moment after."""
        mkdir(name, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        os.symlink(victim, name, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", replaced)
        make_beneath(root, "/data", directory=True)
    assert victim.stat().st_mode & 0o7777 == 0o700


def test_modes_and_owners_of_names_below_a_descriptor_are_set_by_descriptor() -> None:
    """A guest may replace any name of its root and volumes by a link at any moment (chmod(2) follows it)."""
    calls = {
        f"{path}:{call.lineno}"
        for package in ("sandbox", "network", "cri")
        for path in (ROOT / package).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("chmod", "chown", "utime", "lchown", "truncate", "setxattr")
        and any(keyword.arg in ("dir_fd", "follow_symlinks") for keyword in call.keywords)
    }
    assert calls == set()
