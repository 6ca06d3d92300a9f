"""Builds what a VM boots, on this host: the distribution's kernel, and an initramfs with the agent.

    ROOT/guest/
      packages/NAME_VERSION.deb       kernel packages as downloaded, by version
      kernels/KEY/                    kernels compiled here: see kernel_source
      acl/KEY.ko                      a module compiled here: see acl_module
      HASH/{vmlinux,initramfs,image.json}
      HASH/modules/                   modules that guests load on demand: see modules
      HASH/apparmor                   AppArmor's RuntimeDefault profile, where it could be compiled
      current -> HASH                 the image that new pods get

HASH is computed from the content, so the same inputs give the same directory, and nothing in it changes. A
build runs in a scratch directory that is renamed when it is complete; `current` is replaced by a rename.
After a kill at any moment the old image stays in use, and the next build starts from the beginning and
removes the leftovers. The image before the current one is kept, as a pod may be about to boot it, and so are
those whose modules are mounted, for a VM that runs.
"""

# ruff: noqa: ASYNC240 -- runs as a command, with nothing else on its event loop

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sandbox.errors import MissingProgram
from sandbox.guest_image import acl_module, cpio
from sandbox.guest_image.apparmor import compile_default
from sandbox.guest_image.kernel_source import build_kernel
from sandbox.guest_image.modules import Device, make_store
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
    read_builtin,
)
from sandbox.host import files, mounts
from sandbox.vm_pods.boot_image import (
    ACL_MODULE,
    MODULES_DIRECTORY,
    GuestImage,
    ImageFacts,
    find_image,
)

# Loaded at boot. Each one adds some milliseconds to a cold start.
MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtiofs",
    "virtio_net",
    "overlay",
    "virtio_balloon",
    "virtio_mem",
)
# Meta-packages in the order in which they are tried, the smallest kernels for VMs first: Debian, then Ubuntu.
KERNELS = ("linux-image-cloud-amd64", "linux-image-kvm", "linux-image-virtual", "linux-image-generic")
_IMAGE = re.compile(r"\b(linux-image-(?:unsigned-)?\d[^\s,(]*)")
AGENT = Path(__file__).parents[1] / "agent"
DIRECTORIES = ("dev", "modules", "proc", "run", "sbin", "sys", "tmp")
MODPROBE = "sbin/modprobe"  # CONFIG_MODPROBE_PATH


async def build(
    root: Path,
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    from_source: bool = False,
    package: str = "",
    progress: Progress = lambda line: None,
    agent: Path = AGENT,
    parser: Path | None = None,
) -> GuestImage:
    """Build the image below `root` and make it the one that new pods boot. Quick when nothing has changed.

    `kernel` is used instead of the distribution's; its modules are taken from `modules`, or from where an
    installed or unpacked kernel has them. With `from_source` a small kernel is compiled. `package` is a
    package, or meta-package, of the distribution's that is used in place of its smallest. `agent` is the
    source directory or the program itself. `parser` is an apparmor_parser to use instead of the host's or its
    distribution's. Waits while another build runs. `progress` gets a line for each step. Raises BuildFailed,
    BadKernel, OptionsDropped, MissingProgram, and OSError.
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
                chosen = await fetch_kernel(guest / "packages", scratch, progress, package)
                made = await acl_module.compile_module(chosen.version, guest, scratch, progress)
                chosen = msgspec.structs.replace(chosen, acls=made)
            progress(f"kernel {chosen.version}")
            program = await compile_agent(agent, scratch, progress)
            profile = await compile_default(parser, guest / "packages", scratch, progress)
            image = await asyncio.to_thread(_assemble, guest, scratch, chosen, program, profile)
    progress(f"guest image {image.hash[:16]} is ready")
    return image


# -------------------------------------------------------------------------------------- kernel


def find_modules_of(kernel: Path) -> Path:
    """Find the modules of a kernel by the version in its file name: in lib/modules of the tree that it lies
    in, or of this host. Raises BadKernel.
    """
    version = re.sub(r"^(vmlinuz|vmlinux|bzImage)-?", "", kernel.name)
    places = [kernel.parent / "modules" / version, kernel.parent.parent / "lib/modules" / version]
    places += [Path("/lib/modules") / version] if version else []
    for place in places:
        if version and (place / "kernel").is_dir():
            return place
    raise BadKernel(str(kernel), "its modules were not found; name their directory with --modules")


async def fetch_kernel(packages: Path, scratch: Path, progress: Progress, package: str = "") -> Kernel:
    """Download (once per version) and unpack the newest kernel for VMs that apt knows, or that of `package`.

    Raises BuildFailed, BadKernel, and MissingProgram on a host without apt.
    """
    need_apt("husk guest build --kernel PATH")
    names = await find_kernel_packages((package,) if package else KERNELS)
    tree = scratch / "package"
    for name, version in names:
        deb = await download(packages, name, version, progress)
        await unpack(deb, tree)
    images = sorted((tree / "boot").glob("vmlinuz-*"))
    if not images:
        raise BadKernel(names[0][0], "its package holds no /boot/vmlinuz")
    version = images[0].name.removeprefix("vmlinuz-")
    directory = next((d for d in (tree / "lib/modules", tree / "usr/lib/modules") if d.is_dir()), tree)
    # distributions' kernels load unsigned modules, unless secure boot, which VMs do not have, forbids it
    return Kernel(image=images[0], modules=directory / version, keep_signatures=False)


async def find_kernel_packages(names: Sequence[str]) -> list[tuple[str, str]]:
    """Find the first of these that apt knows, and the package of its modules where it is separate (Ubuntu);
    return both with their versions.

    A meta-package, whose name is the same for all versions, depends on the package with the version in its
    name. Raises BuildFailed.
    """
    for name in names:
        shown = await show(name)
        if not field(shown, "Version"):
            continue
        image = _IMAGE.search(field(shown, "Depends")) or _IMAGE.fullmatch(name)
        if image is None:
            continue
        details = await show(image[1])
        modules = re.search(r"\b(linux-modules-\d[^\s,(]*)", field(details, "Depends"))
        found = [(image[1], field(details, "Version"))]
        if modules is not None:
            found.append((modules[1], field(await show(modules[1]), "Version")))
        return found
    problem = f"no package of a kernel is known by the name {' or '.join(names)}; run apt-get update"
    raise BuildFailed("apt-cache show", problem)


# --------------------------------------------------------------------------------------- agent


async def compile_agent(source: Path, scratch: Path, progress: Progress) -> bytes:
    """Compile the agent from its sources and return the program; a file is the program itself.

    Raises MissingProgram and BuildFailed.
    """
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


def make_initramfs(program: bytes, modules: Mapping[str, bytes], devices: Sequence[Device] = ()) -> bytes:
    """Compose the initramfs: /init, the modules, their order of loading, and devices to make nodes of.

    Not compressed: an emulated processor reads two megabytes faster than it decompresses one.
    """
    members = [cpio.directory(name) for name in DIRECTORIES]
    members.append(cpio.character_device("dev/console", 5, 1))
    members.append(cpio.file("init", program, 0o755))
    members.append(cpio.file("modules/order", "".join(f"{name}.ko\n" for name in modules).encode()))
    nodes = "".join(f"{each.name} {each.major} {each.minor}\n" for each in devices)
    members.append(cpio.file("modules/devices", nodes.encode()))
    members += [cpio.file(f"modules/{name}.ko", content) for name, content in modules.items()]
    members.append(cpio.symbolic_link(MODPROBE, "/init"))
    return cpio.write_archive(members)


def _assemble(guest: Path, scratch: Path, kernel: Kernel, program: bytes, profile: bytes) -> GuestImage:
    vmlinux = extract_vmlinux(kernel.image.read_bytes(), str(kernel.image))
    available, builtin = find_modules(kernel.modules), read_builtin(kernel.modules)
    keep = kernel.keep_signatures
    modules = load_modules(available, builtin, MODULES, keep_signatures=keep)
    if kernel.acls is not None:
        modules[ACL_MODULE] = kernel.acls.read_bytes()
    store = make_store(kernel.modules, available, [*builtin, *modules], keep_signatures=keep)
    initramfs = make_initramfs(program, modules, store.devices)
    facts = msgspec.json.encode(ImageFacts(kernel.version, tuple(modules)))
    contents = {"vmlinux": vmlinux, "initramfs": initramfs, "image.json": facts}
    if profile:
        contents["apparmor"] = profile
    contents |= {f"{MODULES_DIRECTORY}/{name}": content for name, content in store.files.items()}
    digest = hash_of(*(part for name, content in contents.items() for part in (name.encode(), content)))
    staging = scratch / digest
    staging.mkdir(mode=0o755)
    for name, content in contents.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        _write(staging / name, content)
    final = guest / digest
    try:
        staging.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise  # else it exists already, with the same content
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
    files.sync(guest)


def _sweep(guest: Path, scratch: Path) -> None:
    """Remove all images but the current one, the one before it, and those whose modules a guest may load;
    also leftovers of killed builds.
    """
    used = {
        Path(root).parent.name for root in mounts.mounted_roots() if root.endswith(f"/{MODULES_DIRECTORY}")
    }
    current = (guest / "current").resolve()
    images = [d for d in guest.iterdir() if (d / "image.json").exists() and not d.is_symlink()]
    others = sorted((d for d in images if d != current), key=lambda d: d.stat().st_mtime)
    left = [d for d in guest.glob(".build-*") if d != scratch]
    for directory in (*(each for each in others[:-1] if each.name not in used), *left):
        shutil.rmtree(directory)
