"""The module for ACLs on volumes is compiled once for each kernel, and left out where it cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sandbox.guest_image import acl_module, packages

RELEASE = "9.9-cloud"
MODULES = """CONFIG_DEBUG_INFO_BTF_MODULES := y
ifdef CONFIG_DEBUG_INFO_BTF_MODULES
$(error pahole is needed)
endif
modules:
\techo 'int husk;' | cc -g -x c -c -o $(M)/husk_acl.ko -
\ttest -f $(M)/husk_acl.c && grep -q husk_acl.o $(M)/Kbuild
"""


class Apt:
    """Three packages: the headers include their Makefile by an absolute path, as Debian's do."""

    def __init__(self) -> None:
        self.known = True
        self.makefile = MODULES
        self.version = "9.9-1"

    async def show(self, package: str) -> str:
        """As apt-cache(8)."""
        depends = "linux-headers-9.9-common (= 9.9-1), linux-kbuild-9.9 (>= 9.9-1), linux-compiler-gcc"
        return f"Package: {package}\nVersion: {self.version}\nDepends: {depends}\n" if self.known else ""

    async def download(self, directory: Path, name: str, version: str, progress: packages.Progress) -> Path:
        """Return a path with the package's name."""
        progress(f"downloading {name} {version}")
        return directory / name

    async def unpack(self, package: Path, tree: Path) -> None:
        """Unpack one of the three."""
        files = {
            f"linux-headers-{RELEASE}": ("src", "include /usr/src/linux-headers-9.9-common/Makefile\n"),
            "linux-headers-9.9-common": ("src", self.makefile),
            "linux-kbuild-9.9": ("lib", ""),
        }
        place, makefile = files[package.name]
        (tree / "usr" / place / package.name).mkdir(parents=True)
        (tree / "usr" / place / package.name / "Makefile").write_text(makefile)


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> Apt:
    made = Apt()
    for name in ("show", "download", "unpack"):
        monkeypatch.setattr(acl_module, name, getattr(made, name))
    return made


async def compile_it(root: Path, lines: list[str] | None = None) -> Path | None:
    scratch = root / ".build-x"
    scratch.mkdir()
    try:
        progress = (lines if lines is not None else []).append
        return await acl_module.compile_module(RELEASE, root, scratch, progress)
    finally:
        shutil.rmtree(scratch)


async def test_module_is_compiled_once_for_each_version(tmp_path: Path, apt: Apt) -> None:
    first = await compile_it(tmp_path)
    assert first is not None and b".debug_info" not in first.read_bytes()
    lines: list[str] = []
    assert await compile_it(tmp_path, lines) == first
    assert lines == []
    apt.version = "9.9-2"
    second = await compile_it(tmp_path, lines)
    assert second is not None and second != first
    assert [line.split()[1] for line in lines[1:]] == [
        f"linux-headers-{RELEASE}",
        "linux-headers-9.9-common",
        "linux-kbuild-9.9",
    ]
    assert list((tmp_path / "acl").iterdir()) == [second]


async def test_unknown_headers_leave_the_module_out(tmp_path: Path, apt: Apt) -> None:
    apt.known = False
    lines: list[str] = []
    assert await compile_it(tmp_path, lines) is None
    assert f"linux-headers-{RELEASE} is not known" in lines[0]
    assert list(tmp_path.iterdir()) == []


async def test_failed_compilation_leaves_the_module_out(tmp_path: Path, apt: Apt) -> None:
    apt.makefile = "modules:\n\techo no such function; false\n"
    lines: list[str] = []
    assert await compile_it(tmp_path, lines) is None
    assert "no such function" in lines[-1]
    assert list(tmp_path.iterdir()) == []
    apt.makefile = MODULES
    assert await compile_it(tmp_path) is not None
