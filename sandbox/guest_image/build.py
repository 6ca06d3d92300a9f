"""What a VM boots: the distribution's kernel and an initramfs with the agent, made on this host.

    ROOT/guest/
      packages/NAME_VERSION.deb       kernel packages as downloaded, by version
      kernels/KEY/                    kernels compiled here: see kernel_source
      HASH/{vmlinux,initramfs,image.json}
      HASH/apparmor                   AppArmor's RuntimeDefault profile, where it could be compiled
      current -> HASH                 the image that new pods get

HASH is taken of the content, so the same inputs give the same directory, and nothing in it ever
changes. A build happens in a directory beside it that gets its name when it is complete; `current`
is replaced by renaming. Killed anywhere, the old image stays in use and the next build starts anew
and sweeps what was left. The image before the last is kept, as a pod may be about to boot it.
"""

# ruff: noqa: ASYNC240 -- runs as a command of its own, with nothing else on its loop

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sandbox.errors import MissingProgram
from sandbox.guest_image import cpio
from sandbox.guest_image.apparmor import compile_default
from sandbox.guest_image.kernel_source import build_kernel
from sandbox.guest_image.packages import (
    BuildFailed,
    Progress,
    alone,
    checked,
    download,
    field,
    hash_of,
    need_apt,
    show,
    unpack,
)
from sandbox.guest_image.vmlinux import (
    BadKernel,
    Kernel,
    extract_vmlinux,
    find_modules,
    load_modules,
    load_orders,
    read_builtin,
)
from sandbox.vm_pods.boot_image import GuestImage, ImageFacts, find_image

# Each module costs a cold start some milliseconds.
MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtiofs",
    "virtio_net",
    "overlay",
    "virtio_balloon",
    "virtio_mem",
)
# For a container with NET_ADMIN that makes links of its own: the kernel loads these when one is made.
ON_DEMAND = ("bridge", "veth", "dummy", "tun")
# The smallest kernel that a distribution offers for VMs comes first: Debian, then Ubuntu.
KERNELS = ("linux-image-cloud-amd64", "linux-image-kvm", "linux-image-virtual", "linux-image-generic")
AGENT = Path(__file__).parents[1] / "agent"
DIRECTORIES = ("dev", "modules", "modules/load", "proc", "run", "sbin", "sys", "tmp")
MODPROBE = "sbin/modprobe"  # where a kernel looks for it (CONFIG_MODPROBE_PATH)


async def build(
    root: Path,
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    from_source: bool = False,
    progress: Progress = lambda line: None,
    agent: Path = AGENT,
    parser: Path | None = None,
) -> GuestImage:
    """Make the image and let new pods use it; quick when nothing has changed.

    `kernel` is used instead of the distribution's; its modules are looked for in `modules`, or
    where an installed or unpacked kernel has them. With `from_source` a small kernel is compiled.
    `parser` is an apparmor_parser to use instead of the host's or its distribution's.
    Raises BuildFailed, BadKernel, OptionsDropped, MissingProgram, and OSError.
    """
    guest = root / "guest"
    guest.mkdir(parents=True, exist_ok=True)
    async with alone(guest, progress):
        with tempfile.TemporaryDirectory(dir=guest, prefix=".build-") as scratch_name:
            scratch = Path(scratch_name)
            if kernel is not None:
                chosen = Kernel(image=kernel, modules=modules or find_modules_of(kernel))
            elif from_source:
                chosen = await build_kernel(guest, scratch, progress)
            else:
                chosen = await fetch_kernel(guest / "packages", scratch, progress)
            progress(f"kernel {chosen.version}")
            program = await compile_agent(agent, scratch, progress)
            profile = await compile_default(parser, guest / "packages", scratch, progress)
            image = await asyncio.to_thread(_assemble, guest, scratch, chosen, program, profile)
    progress(f"guest image {image.hash[:16]} is ready")
    return image


# -------------------------------------------------------------------------------------- kernel


def find_modules_of(kernel: Path) -> Path:
    """The modules directory of a kernel by its file name's version: beside it (lib/modules of the
    tree that it lies in) or of this host. Raises BadKernel.
    """
    version = re.sub(r"^(vmlinuz|vmlinux|bzImage)-?", "", kernel.name)
    places = [kernel.parent / "modules" / version, kernel.parent.parent / "lib/modules" / version]
    places += [Path("/lib/modules") / version] if version else []
    for place in places:
        if version and (place / "kernel").is_dir():
            return place
    raise BadKernel(str(kernel), "its modules were not found; name their directory with --modules")


async def fetch_kernel(packages: Path, scratch: Path, progress: Progress) -> Kernel:
    """Download (once per version) and unpack the newest kernel for VMs that apt knows."""
    need_apt("husk guest build --kernel PATH")
    names = await find_kernel_packages()
    tree = scratch / "package"
    for name, version in names:
        deb = await download(packages, name, version, progress)
        await unpack(deb, tree)
    images = sorted((tree / "boot").glob("vmlinuz-*"))
    if not images:
        raise BadKernel(names[0][0], "its package holds no /boot/vmlinuz")
    version = images[0].name.removeprefix("vmlinuz-")
    directory = next((d for d in (tree / "lib/modules", tree / "usr/lib/modules") if d.is_dir()), tree)
    # distributions' kernels take unsigned modules, unless firmware that VMs do not have forbids it
    return Kernel(image=images[0], modules=directory / version, keep_signatures=False)


async def find_kernel_packages() -> list[tuple[str, str]]:
    """The package of the kernel itself, with the one of its modules where that is separate (Ubuntu).

    The name that stays the same over upgrades depends on the one with the version in it.
    """
    for meta in KERNELS:
        shown = await show(meta)
        image = re.search(r"\b(linux-image-(?:unsigned-)?\d[^\s,(]*)", field(shown, "Depends"))
        if image is None:
            continue
        details = await show(image[1])
        modules = re.search(r"\b(linux-modules-\d[^\s,(]*)", field(details, "Depends"))
        found = [(image[1], field(details, "Version"))]
        if modules is not None:
            found.append((modules[1], field(await show(modules[1]), "Version")))
        return found
    raise BuildFailed("apt-cache show", f"none of {', '.join(KERNELS)} is known; run apt-get update")


# --------------------------------------------------------------------------------------- agent


async def compile_agent(source: Path, scratch: Path, progress: Progress) -> bytes:
    """Compile the agent out of its sources; a file is taken as the program itself."""
    if source.is_file():
        return source.read_bytes()
    for program, package in (("make", "make"), ("cc", "gcc libc6-dev libprotobuf-c-dev protobuf-c-compiler")):
        if shutil.which(program) is None:
            raise MissingProgram(program, f"apt-get install {package}")
    progress("compiling the agent")
    out = scratch / "agent"
    out.mkdir()
    await checked(["make", "-C", str(source), f"OUT={out}"], timeout_s=300)
    return (out / "husk-agent").read_bytes()


# ------------------------------------------------------------------------------------ assembly


def make_initramfs(program: bytes, modules: Mapping[str, bytes], later: Mapping[str, bytes]) -> bytes:
    """/init, the modules, and the order to load them in; for `later` ones, which the kernel asks for by
    calling modprobe, the order for each name that it may ask by. Not compressed: reading two
    megabytes is quicker for an emulated processor than unpacking one.
    """
    members = [cpio.directory(name) for name in DIRECTORIES]
    members.append(cpio.character_device("dev/console", 5, 1))
    members.append(cpio.file("init", program, 0o755))
    members.append(cpio.file("modules/order", "".join(f"{name}.ko\n" for name in modules).encode()))
    both = {**modules, **later}
    members += [cpio.file(f"modules/{name}.ko", content) for name, content in both.items()]
    members += [
        cpio.file(f"modules/load/{alias}", "".join(f"{each}.ko\n" for each in order).encode())
        for alias, order in load_orders(later).items()
    ]
    members.append(cpio.symbolic_link(MODPROBE, "/init"))
    return cpio.write_archive(members)


def _assemble(guest: Path, scratch: Path, kernel: Kernel, program: bytes, profile: bytes) -> GuestImage:
    vmlinux = extract_vmlinux(kernel.image.read_bytes(), str(kernel.image))
    available, builtin = find_modules(kernel.modules), read_builtin(kernel.modules)
    keep = kernel.keep_signatures
    modules = load_modules(available, builtin, MODULES, keep_signatures=keep)
    offered = [name for name in ON_DEMAND if name in available]
    later = load_modules(available, [*builtin, *modules], offered, keep_signatures=keep)
    initramfs = make_initramfs(program, modules, later)
    facts = msgspec.json.encode(ImageFacts(kernel.version, tuple(modules)))
    files = {"vmlinux": vmlinux, "initramfs": initramfs, "image.json": facts}
    if profile:
        files["apparmor"] = profile
    digest = hash_of(*files.values())
    staging = scratch / digest
    staging.mkdir(mode=0o755)
    for name, content in files.items():
        _write(staging / name, content)
    final = guest / digest
    try:
        staging.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise  # it is there already, with the same content
    _make_current(guest, scratch, digest)
    _sweep(guest, scratch)
    image = find_image(guest.parent)
    assert image is not None
    return image


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as out:
        out.write(content)
        out.flush()
        os.fchmod(out.fileno(), 0o644)
        os.fsync(out.fileno())


def _make_current(guest: Path, scratch: Path, digest: str) -> None:
    link = scratch / "current"
    link.symlink_to(digest)
    link.rename(guest / "current")
    descriptor = os.open(guest, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(guest: Path, scratch: Path) -> None:
    """Remove all images but the current and the one before, and what killed builds have left."""
    current = (guest / "current").resolve()
    images = [d for d in guest.iterdir() if (d / "image.json").exists() and not d.is_symlink()]
    others = sorted((d for d in images if d != current), key=lambda d: d.stat().st_mtime)
    left = [d for d in guest.glob(".build-*") if d != scratch]
    for directory in (*others[:-1], *left):
        shutil.rmtree(directory)
