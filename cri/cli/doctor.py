"""`husk doctor`: what this host has, lacks, and which Debian package brings it.

Each check is a function that looks at one thing and says one sentence. A check that breaks is a
failed check, never the end of the others. Everything that is tried is undone by itself: trial
mounts live in a mount namespace that ends with the trial.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cri.config import Config
from network.conf import find_conf
from network.errors import CniError, NetworkNotReady
from network.plugins import Plugins
from sandbox.apparmor.loaded import HOST_POLICY
from sandbox.errors import MissingProgram
from sandbox.host import cgroup
from sandbox.host.findings import CheckResult, Finding, HostCheck, device_check, fail, ok, warn
from sandbox.seccomp import seccomp_for
from sandbox.spec import Seccomp, SeccompKind, SecuritySpec
from sandbox.vm_pods import boot_image
from sandbox.vm_pods.accelerator import Prober
from sandbox.vmm.drivers import Hypervisors, find_host

TRIAL_TIMEOUT_S = 20
SPACE_FAIL = 512 << 20
SPACE_WARN = 4 << 30


@dataclass(frozen=True, slots=True)
class Host:
    """What is examined. `fs` is "/" but for tests."""

    config: Config
    fs: Path = Path("/")
    which: Callable[[str], str | None] = shutil.which


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    look: Callable[[Host], Awaitable[Finding]]


async def examine(host: Host) -> Sequence[Finding]:
    """Run every check; returns one finding for each, in their order."""
    return [await _contained(check, host) for check in checks_of(host)]


def checks_of(host: Host) -> Sequence[Check]:
    """Return all checks: ours, and those that the drivers of the configured handlers bring."""
    handlers = host.config.runtime_handlers().values()
    drivers = dict.fromkeys(handler.hypervisor for handler in handlers)
    brought = [check for name in drivers for check in find_host(name, host.fs).checks()]
    return (CHECKS[0], *(Check(each.name, _of_driver(each)) for each in brought), *CHECKS[1:])


def _of_driver(check: HostCheck) -> Callable[[Host], Awaitable[Finding]]:
    async def look(host: Host) -> Finding:
        return await check.run()

    return look


async def _contained(check: Check, host: Host) -> Finding:
    try:
        return await check.look(host)
    except Exception as error:
        return fail(check.name, f"could not be examined: {error}")


# -------------------------------------------------------------------------------- programs


async def user(host: Host) -> Finding:
    if os.geteuid() == 0:
        return ok("user", "runs as root")
    return fail("user", "root is needed, for mounts, namespaces and cgroups", "run it with sudo")


async def host_pods(host: Host) -> Finding:
    name = "host-pods"
    handlers = host.config.runtime_handlers().values()
    if all(handler.host_pods == "refuse" for handler in handlers):
        return ok(name, "those that ask for namespaces of the node are refused")
    missing = [program for program in ("conmon", "crun") if host.which(program) is None]
    if missing:
        programs = " and ".join(missing)
        return warn(
            name,
            f"{programs} not found: pods with the node's network, PID or IPC cannot be started",
            f"apt-get install {' '.join(missing)}",
        )
    return ok(name, "conmon and crun are there for pods that share namespaces with the node")


async def seccomp(host: Host) -> Finding:
    wanted = SecuritySpec(seccomp=Seccomp(kind=SeccompKind.RUNTIME_DEFAULT))
    try:
        await asyncio.to_thread(seccomp_for, wanted)
    except MissingProgram as error:
        return fail("libseccomp", str(error), error.package)
    return ok("libseccomp", "compiles the default seccomp profile")


async def apparmor(host: Host) -> Finding:
    if not boot_image.default_profile(Path(host.config.root)).is_file():
        fix = "husk guest build, where apt knows the package apparmor"
        return warn("apparmor", "RuntimeDefault is refused: the guest image has no profile for it", fix)
    if not (host.fs / HOST_POLICY.relative_to("/")).is_dir():
        return ok("apparmor", "RuntimeDefault can be had; no profiles of this host, whose kernel has none")
    return ok("apparmor", "RuntimeDefault and the profiles that are loaded on this host can be had")


# ------------------------------------------------------------------------------ guest, accelerator


async def guest(host: Host) -> Finding:
    if missing := _missing_files(host.config):
        return fail("guest", f"{missing} does not exist", "correct the configuration")
    image = boot_image.find_image(Path(host.config.root))
    if image is None:
        return fail("guest", f"no kernel and initramfs under {host.config.root}/guest", "husk guest build")
    return ok("guest", f"kernel {image.kernel_version}, image {image.hash[:16]}")


async def accelerator(host: Host) -> Finding:
    """Report the default handler's accelerator. Boots a VM if only a trial can tell and none was made yet."""
    handler = host.config.runtime_handlers()[""]
    driver = find_host(handler.hypervisor, host.fs)
    first = driver.candidates()[0]
    if handler.accelerator == "auto" and not first.trial:
        return ok("accelerator", f"{first.accelerator}: {first.reason}")
    image = boot_image.find_image(Path(host.config.root))
    if image is None:
        return warn("accelerator", "cannot be tried without a guest image", "husk guest build")
    prober = Prober(handler.hypervisor, driver, Hypervisors(), Path(host.config.run))
    choice = await prober.choose(handler.accelerator, image)
    return ok("accelerator", f"{choice.accelerator}: {choice.reason}")


def _missing_files(config: Config) -> str:
    """The first kernel or initramfs that a handler names and nobody has."""
    for name, handler in config.handlers.items():
        for path in (handler.kernel, handler.initramfs):
            if path and not Path(path).is_file():
                return f"handlers.{name}: {path}"
    return ""


async def tun(host: Host) -> Finding:
    """Open the device that taps are made with."""
    missing = fail("tun", "/dev/net/tun is missing: no pod can have a network", "modprobe tun")
    return await device_check(host.fs / "dev/net/tun", use="pods can have a network", missing=missing).run()


# ------------------------------------------------------------------------------------- network


async def cni(host: Host) -> Finding:
    try:
        network = find_conf(Path(host.config.cni.conf_dir))
    except NetworkNotReady as error:
        if error.__cause__ is not None:
            return fail("cni", str(error), "correct the file")
        # the daemon starts without, and picks one up when it appears
        return warn("cni", f"{error}: pods cannot start yet", "install a CNI network")
    plugins = Plugins(bin_dirs=tuple(map(Path, host.config.cni.bin_dirs)))
    try:
        for plugin in network.plugins:
            plugins.find(plugin.type)
    except CniError as error:
        fix = "apt-get install containernetworking-plugins, or see cni.bin_dirs"
        return fail("cni", f"{network.file}: {error.plugin!r}: {error.message}", fix)
    return ok("cni", f"network {network.name!r} of {network.file}")


async def iptables(host: Host) -> Finding:
    if host.which("iptables") or host.which("nft"):
        return ok("firewall", "iptables or nft is there for host ports and masquerading")
    return warn(
        "firewall", "neither iptables nor nft: CNI's portmap and ipMasq will fail", "apt-get install iptables"
    )


# ------------------------------------------------------------------------------ cgroups, storage


async def cgroups(host: Host) -> Finding:
    layout = cgroup.find_layout()
    if not layout.roots:
        return fail("cgroups", "no cgroup hierarchy is mounted", "mount cgroup2 at /sys/fs/cgroup")
    return ok("cgroups", f"{layout.mode}; the kubelet's driver is {cgroup.find_driver(layout)}")


OVERLAY_TRIAL = (
    'mount -t overlay overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" "$1/merged"'
    ' && test "$(cat "$1/merged/file")" = husk && echo more > "$1/merged/file"'
)


async def overlayfs(host: Host) -> Finding:
    """Really mounts one: some filesystems (another overlay, some network ones) cannot be the upper."""
    root = _existing(Path(host.config.root))
    with tempfile.TemporaryDirectory(dir=root, prefix=".husk-doctor-") as trial:
        for name in ("lower", "upper", "work", "merged"):
            (Path(trial) / name).mkdir()
        (Path(trial) / "lower/file").write_text("husk")
        said = await _run(["unshare", "--mount", "sh", "-c", OVERLAY_TRIAL, "sh", trial])
    if said.returncode != 0:
        problem = " ".join(said.stderr.split()) or f"exit status {said.returncode}"
        return fail("overlayfs", f"does not work on {root}: {problem}", "put `root` on ext4 or xfs")
    return ok("overlayfs", f"works on {root}")


async def space(host: Host) -> Finding:
    root = _existing(Path(host.config.root))
    free = shutil.disk_usage(root).free
    text = f"{free / (1 << 30):.1f} GiB free on {root}"
    if free < SPACE_FAIL:
        return fail("space", text, "make room, or move `root`")
    return warn("space", text, "images need room") if free < SPACE_WARN else ok("space", text)


def _existing(path: Path) -> Path:
    """The nearest directory above that is there already."""
    return next(place for place in (path, *path.parents) if place.is_dir())


async def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=TRIAL_TIMEOUT_S, check=False
        )

    return await asyncio.to_thread(run)


# --------------------------------------------------------------------------------------- output


CHECKS: Sequence[Check] = (
    Check("user", user),
    Check("libseccomp", seccomp),
    Check("guest", guest),
    Check("apparmor", apparmor),
    Check("accelerator", accelerator),
    Check("tun", tun),
    Check("host-pods", host_pods),
    Check("cni", cni),
    Check("firewall", iptables),
    Check("cgroups", cgroups),
    Check("overlayfs", overlayfs),
    Check("space", space),
)


def failed(findings: Sequence[Finding]) -> bool:
    return any(finding.result is CheckResult.FAIL for finding in findings)


def as_text(findings: Sequence[Finding]) -> Iterator[str]:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        fix = f"  [fix: {finding.fix}]" if finding.fix else ""
        yield f"{finding.result:<4} {finding.name:<{width}}  {finding.detail}{fix}"


def as_json(findings: Sequence[Finding]) -> str:
    document = {"ok": not failed(findings), "checks": findings}
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
