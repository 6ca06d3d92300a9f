"""The compiled kernel: its options, its cache, and its build from a source tree that needs only make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sandbox.errors import MissingProgram
from sandbox.guest_image import kernel_source, packages
from sandbox.guest_image import vmlinux as vmlinux_module
from sandbox.guest_image.build import MODULES
from sandbox.guest_image.kernel_source import OptionsDropped
from sandbox.guest_image.packages import BuildFailed
from sandbox.host import process

FRAGMENT = """\
# a heading
CONFIG_A=y
CONFIG_NUMBER=12
## or
CONFIG_NUMMER=12
# CONFIG_OFF is not set
CONFIG_TEXT="-x"
"""


def test_options_are_parsed_with_their_alternatives() -> None:
    assert kernel_source.find_options(FRAGMENT) == [
        ("CONFIG_A=y",),
        ("CONFIG_NUMBER=12", "CONFIG_NUMMER=12"),
        ("# CONFIG_OFF is not set",),
        ('CONFIG_TEXT="-x"',),
    ]


@pytest.mark.parametrize(
    ("config", "dropped"),
    [
        ('CONFIG_A=y\nCONFIG_NUMBER=12\nCONFIG_TEXT="-x"\n', ()),
        ('CONFIG_A=y\nCONFIG_NUMMER=12\n# CONFIG_OFF is not set\nCONFIG_TEXT="-x"\n', ()),
        ('# CONFIG_A is not set\nCONFIG_NUMBER=12\nCONFIG_TEXT="-x"\n', ("CONFIG_A=y",)),
        ('CONFIG_A=m\nCONFIG_NUMBER=12\nCONFIG_TEXT="-x"\n', ("CONFIG_A=y",)),
        ('CONFIG_AB=y\nCONFIG_NUMBER=12\nCONFIG_TEXT="-x"\n', ("CONFIG_A=y",)),
        (
            'CONFIG_A=y\nCONFIG_NUMBER=1\nCONFIG_OFF=y\nCONFIG_TEXT=""\n',
            ("CONFIG_NUMBER=12 or CONFIG_NUMMER=12", "# CONFIG_OFF is not set", 'CONFIG_TEXT="-x"'),
        ),
    ],
)
def test_options_missing_from_the_configuration_are_named(config: str, dropped: tuple[str, ...]) -> None:
    assert kernel_source.find_dropped(FRAGMENT, config) == dropped


def test_kernel_config_is_well_formed() -> None:
    text = kernel_source.OPTIONS.read_text()
    for line in text.splitlines():
        assert re.fullmatch(r"(CONFIG_\w+=\S+|# CONFIG_\w+ is not set|#.*|)", line), line
    options = [option for line in kernel_source.find_options(text) for option in line]
    assert len(options) == len(set(options)), "one is named twice"
    assert not [option for option in options if option.endswith("=m")], "nothing would load a module"


def test_key_depends_on_every_input() -> None:
    inputs = ["linux-source-6.1 6.1.1-1", "CONFIG_A=y", "cc 12.2", "ld 2.40"]

    def key() -> str:
        source, options, compiler, linker = inputs
        return kernel_source.make_key(source, options.encode(), compiler, linker)

    first = key()
    assert first == key()
    for number, value in enumerate(inputs):
        inputs[number] = value + "0"
        assert key() != first
        inputs[number] = value


# --------------------------------------------------------------------------- a made-up source

# allnoconfig takes what Kconfig.names knows; vmlinux is compiled of one file and marked with the environment
MAKEFILE = """\
allnoconfig:
	grep -F -f Kconfig.names $(KCONFIG_ALLCONFIG) >.config || true
vmlinux:
	mkdir -p include/config && echo 9.9.9-husk >include/config/kernel.release
	printf 'kernel/%s.ko\\n' {modules} >modules.builtin
	echo 'char mark[] = "$(ARCH) $(KBUILD_BUILD_HOST) $(KBUILD_BUILD_TIMESTAMP)";' >it.c
	echo 'int main(void) {{ return 0; }}' >>it.c
	cc -g -Wl,--build-id=none -o vmlinux it.c {flags}
"""
DATE_S = 1_700_000_000  # 2023-11-14


def make_archive(directory: Path, *, known: str = "CONFIG_", flags: str = "") -> Path:
    """Make linux-source.tar.xz of a tree whose Kconfig knows the options that contain `known`."""
    tree = directory / "linux-source-9.9"
    tree.mkdir(parents=True)
    (tree / "Makefile").write_text(MAKEFILE.format(modules=" ".join(MODULES), flags=flags))
    (tree / "Kconfig.names").write_text(known + "\n")
    os.utime(tree / "Makefile", (DATE_S, DATE_S))
    archive = directory / "linux-source-9.9.tar.xz"
    subprocess.run(["tar", "-cJf", str(archive), "-C", str(directory), tree.name], check=True)
    return archive


def make_scratch(directory: Path) -> Path:
    directory.mkdir()
    (directory / "kernel.config").write_text("CONFIG_A=y\nCONFIG_B=y\n")
    return directory


async def compile_it(archive: Path, scratch: Path) -> vmlinux_module.Kernel:
    lines: list[str] = []
    made = await kernel_source.compile_kernel(archive, scratch / "kernel.config", scratch, lines.append)
    assert any("compiling" in line for line in lines)
    (modules,) = (made / "modules").iterdir()
    return vmlinux_module.Kernel(image=made / "vmlinux", modules=modules)


async def test_kernel_is_compiled_and_stripped(tmp_path: Path) -> None:
    kernel = await compile_it(make_archive(tmp_path / "a"), make_scratch(tmp_path / "s"))
    vmlinux = kernel.image.read_bytes()
    assert vmlinux_module.extract_vmlinux(vmlinux) == vmlinux
    assert b"x86_64 husk 2023-11-14" in vmlinux
    assert b".debug_info" not in vmlinux
    assert kernel.version == "9.9.9-husk"
    assert (kernel.image.parent / "config").read_text() == "CONFIG_A=y\nCONFIG_B=y\n"
    builtin = vmlinux_module.read_builtin(kernel.modules)
    assert vmlinux_module.load_modules(vmlinux_module.find_modules(kernel.modules), builtin, MODULES) == {}


async def test_kernel_contains_neither_path_nor_time(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a")
    one = await compile_it(archive, make_scratch(tmp_path / "one"))
    two = await compile_it(archive, make_scratch(tmp_path / "elsewhere"))
    assert one.image.read_bytes() == two.image.read_bytes()


async def test_option_that_kconfig_drops_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionsDropped, match="CONFIG_B=y") as raised:
        await compile_it(make_archive(tmp_path / "a", known="CONFIG_A="), make_scratch(tmp_path / "s"))
    assert raised.value.options == ("CONFIG_B=y",)


async def test_output_of_the_compiler_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="no-such-flag") as raised:
        await compile_it(make_archive(tmp_path / "a", flags="-fno-such-flag"), make_scratch(tmp_path / "s"))
    assert "vmlinux" in raised.value.what


# ------------------------------------------------------------------------------------ the cache


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace apt by a package that contains a small source tree."""
    archive = make_archive(tmp_path / "usr/src")
    package = tmp_path / "package.deb"
    package.touch()

    async def find_source() -> tuple[str, str]:
        return "linux-source-9.9", "9.9.9-1"

    async def download(packages: Path, name: str, version: str, progress: packages.Progress) -> Path:
        progress(f"downloading {name} {version}")
        return package

    async def unpack(package: Path, directory: Path) -> None:
        (directory / "usr/src").mkdir(parents=True)
        (directory / "usr/src" / archive.name).write_bytes(archive.read_bytes())

    async def check_tools(scratch: Path) -> None:
        pass  # has a separate test

    for function in (find_source, download, unpack, check_tools):
        monkeypatch.setattr(kernel_source, function.__name__, function)
    return tmp_path


async def build(root: Path, options: str, lines: list[str] | None = None) -> vmlinux_module.Kernel:
    fragment = root / "kernel.config"
    fragment.write_text(options)
    scratch = root / "guest/.build-x"
    scratch.mkdir(parents=True)
    try:
        progress = (lines if lines is not None else []).append
        return await kernel_source.build_kernel(root / "guest", scratch, progress, fragment)
    finally:
        shutil.rmtree(scratch)


async def test_kernel_is_compiled_once(source: Path) -> None:
    first = await build(source, "CONFIG_A=y\n")
    lines: list[str] = []
    assert await build(source, "CONFIG_A=y\n", lines) == first
    assert lines == [], "neither fetched nor compiled"
    assert await build(source, "CONFIG_B=y\n") != first
    assert first.image.exists(), "the one before is kept"
    await build(source, "CONFIG_C=y\n")
    assert not first.image.exists() and len(list((source / "guest/kernels").iterdir())) == 2


async def test_failed_build_leaves_nothing_and_can_be_repeated(source: Path) -> None:
    (source / "usr/src").rename(source / "usr/right")
    bad = make_archive(source / "usr/src", known="CONFIG_B=")
    with pytest.raises(OptionsDropped):
        await build(source, "CONFIG_A=y\n")
    assert not (source / "guest/kernels").exists()
    (source / "usr/right" / bad.name).rename(bad)
    assert (await build(source, "CONFIG_A=y\n")).image.exists()


async def test_all_missing_tools_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is a program that fails, so the header is missing on any machine."""
    for tool, program in {"make": "true", "cc": "false", "ld": "true", "xz": "true"}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{program}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", str(tmp_path / "bin"))  # of the programs it runs
    with pytest.raises(MissingProgram, match=r"flex, bison, bc, gelf\.h") as raised:
        await kernel_source.check_tools(tmp_path)
    assert raised.value.package == "apt-get install binutils flex bison bc libelf-dev"


async def test_missing_header_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_source, "TOOLS", {"cc": "gcc"})
    monkeypatch.setattr(kernel_source, "ELF_HEADER", ("no/such.h", "libno-dev"))
    with pytest.raises(MissingProgram, match=r"no/such\.h was not found.*libno-dev"):
        await kernel_source.check_tools(tmp_path)
    monkeypatch.setattr(kernel_source, "ELF_HEADER", ("stdio.h", "libc6-dev"))
    await kernel_source.check_tools(tmp_path)
