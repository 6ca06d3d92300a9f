"""`husk doctor`: checks what Husk needs of this host, and names what to do about what is missing.

Each check examines one thing and returns one finding. A check that raises is a failed check and does not
stop the others. Trials leave nothing: trial mounts are made in a separate mount namespace.
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
from sandbox import capabilities
from sandbox.apparmor.loaded import HOST_POLICY
from sandbox.errors import MissingProgram
from sandbox.host import cgroup
from sandbox.host.findings import CheckResult, Finding, HostCheck, device_check, fail, ok, warn
from sandbox.host.proc import effective_capabilities
from sandbox.seccomp import seccomp_for
from sandbox.spec import Seccomp, SeccompKind, SecuritySpec
from sandbox.vm_pods import boot_image
from sandbox.vm_pods.accelerator import Prober
from sandbox.vmm import EMULATION
from sandbox.vmm.drivers import Hypervisors, find_host

TRIAL_TIMEOUT_S = 20
SPACE_FAIL = 512 << 20  # bytes free
SPACE_WARN = 4 << 30


@dataclass(frozen=True, slots=True)
class Host:
    """The host to examine. `fs` is its root directory, "/" except in tests; `which` finds a program."""

    config: Config
    fs: Path = Path("/")
    which: Callable[[str], str | None] = shutil.which


@dataclass(frozen=True, slots=True)
class Check:
    """A check and the name of its finding."""

    name: str
    run: Callable[[Host], Awaitable[Finding]]


async def examine(host: Host) -> Sequence[Finding]:
    """Run every check; return one finding for each, in their order."""
    return [await _contained(check, host) for check in checks_of(host)]


def checks_of(host: Host) -> Sequence[Check]:
    """Return all checks: ours, and those that the drivers of the configured handlers bring."""
    handlers = host.config.runtime_handlers().values()
    drivers = dict.fromkeys(handler.hypervisor for handler in handlers)
    brought = [check for name in drivers for check in find_host(name, host.fs).checks()]
    return (CHECKS[0], *(Check(each.name, _of_driver(each)) for each in brought), *CHECKS[1:])


def _of_driver(check: HostCheck) -> Callable[[Host], Awaitable[Finding]]:
    async def run(host: Host) -> Finding:
        return await check.run()

    return run


async def _contained(check: Check, host: Host) -> Finding:
    try:
        return await check.run(host)
    except Exception as error:
        return fail(
            check.name, f"the check failed: {type(error).__name__}: {error}", "report this as a bug of Husk"
        )


# -------------------------------------------------------------------------------- programs


async def user(host: Host) -> Finding:
    """Check that this process is root."""
    if os.geteuid() == 0:
        return ok("user", "runs as root")
    return fail("user", "not root, which mounts, namespaces and cgroups need", "run husk with sudo")


async def oom_score(host: Host) -> Finding:
    """Check that VMs can be protected from the host's OOM killer, as Guaranteed pods are."""
    name = "oom-score"
    if effective_capabilities() & capabilities.mask_of(["SYS_RESOURCE"]):
        return ok(name, "VMs get the oom_score_adj of their containers")
    problem = "oom_score_adj of VMs cannot be below that of husk serve: CAP_SYS_RESOURCE is missing"
    return warn(name, problem, "run husk with all capabilities of root")


async def host_pods(host: Host) -> Finding:
    """Check for the programs that run pods without a VM, unless every handler refuses such pods."""
    name = "host-pods"
    handlers = host.config.runtime_handlers().values()
    if all(handler.host_pods == "refuse" for handler in handlers):
        return ok(name, "pods with namespaces of the node are refused, as configured")
    missing = [program for program in ("conmon", "crun") if host.which(program) is None]
    if missing:
        programs = " and ".join(missing)
        return warn(
            name,
            f"{programs} not found: pods with the node's network, PID or IPC namespace cannot start",
            f"apt-get install {' '.join(missing)}",
        )
    return ok(name, "conmon and crun are installed, for pods with namespaces of the node")


async def seccomp(host: Host) -> Finding:
    """Compile the default seccomp profile."""
    wanted = SecuritySpec(seccomp=Seccomp(kind=SeccompKind.RUNTIME_DEFAULT))
    try:
        await asyncio.to_thread(seccomp_for, wanted)
    except MissingProgram as error:
        return fail("libseccomp", str(error), error.package)
    return ok("libseccomp", "the default seccomp profile compiles")


async def apparmor(host: Host) -> Finding:
    """Report which AppArmor profiles containers can have."""
    if not boot_image.default_profile(Path(host.config.root)).is_file():
        fix = "husk guest build, with the package apparmor available to apt"
        return warn("apparmor", "RuntimeDefault is refused, as the guest image has no profile for it", fix)
    if not (host.fs / HOST_POLICY.relative_to("/")).is_dir():
        return ok(
            "apparmor",
            "RuntimeDefault is available; no other profiles, as this host's kernel has no AppArmor",
        )
    return ok("apparmor", "RuntimeDefault and the profiles loaded on this host are available")


# ------------------------------------------------------------------------------ guest, accelerator


async def guest(host: Host) -> Finding:
    """Check for a guest kernel and initramfs: those that handlers name, and the built image."""
    if missing := _missing_files(host.config):
        return fail(
            "guest", f"{missing} does not exist", "correct the path in the configuration, or remove it"
        )
    image = boot_image.find_image(Path(host.config.root))
    if image is None:
        return fail("guest", f"no kernel and initramfs under {host.config.root}/guest", "husk guest build")
    return ok("guest", f"kernel {image.kernel_version}, image {image.hash[:16]}")


async def volume_acls(host: Host) -> Finding:
    """Report whether the built image's kernel enforces ACLs on volumes."""
    image = boot_image.find_image(Path(host.config.root))
    if image is None:
        return warn("acls", "not known, as there is no guest image yet", "husk guest build")
    if boot_image.ACL_MODULE in image.modules:
        return ok("acls", "the guest's kernel enforces POSIX ACLs on root filesystems and volumes")
    fix = "husk guest build, with the distribution's kernel and its linux-headers available to apt"
    return warn("acls", "the guest's kernel ignores POSIX ACLs on volumes", fix)


async def accelerator(host: Host) -> Finding:
    """Report the default handler's accelerator. Boots a VM if it takes a trial and none was made."""
    handler = host.config.runtime_handlers()[""]
    driver = find_host(handler.hypervisor, host.fs)
    first = driver.candidates()[0]
    if handler.accelerator == "auto" and not first.trial:
        return _accelerator(first.accelerator, first.reason)
    image = boot_image.find_image(Path(host.config.root))
    if image is None:
        return warn("accelerator", "not tried, as there is no guest image yet", "husk guest build")
    prober = Prober(handler.hypervisor, driver, Hypervisors(), Path(host.config.run))
    choice = await prober.choose(handler.accelerator, image)
    return _accelerator(choice.accelerator, choice.reason)


def _accelerator(name: str, reason: str) -> Finding:
    """QEMU promises isolation with KVM alone (its documentation, "Security", the virtualization use case)."""
    if name != EMULATION:
        return ok("accelerator", f"{name}: {reason}")
    detail = f"{name}: {reason}; QEMU does not promise that an emulated VM confines its guest"
    return warn("accelerator", detail, 'a host with KVM, and accelerator = "kvm" for pods of strangers')


def _missing_files(config: Config) -> str:
    """Return the first kernel or initramfs of a handler that does not exist; "" if all do."""
    for name, handler in config.handlers.items():
        for path in (handler.kernel, handler.initramfs):
            if path and not Path(path).is_file():
                return f"handlers.{name}: {path}"
    return ""


async def tun(host: Host) -> Finding:
    """Open /dev/net/tun, by which tap devices are created."""
    missing = fail("tun", "/dev/net/tun is missing: no pod can have a network", "modprobe tun")
    return await device_check(host.fs / "dev/net/tun", use="pods can have a network", missing=missing).run()


# ------------------------------------------------------------------------------------- network


async def cni(host: Host) -> Finding:
    """Check the CNI configuration of pods and its plug-ins."""
    try:
        network = find_conf(Path(host.config.cni.conf_dir))
    except NetworkNotReady as error:
        if error.__cause__ is not None:
            return fail("cni", str(error), "correct the CNI configuration file")
        # the daemon starts without one, and uses it as soon as it appears
        return warn(
            "cni", f"{error}: pods cannot start yet", f"install a CNI network in {host.config.cni.conf_dir}"
        )
    plugins = Plugins(bin_dirs=tuple(map(Path, host.config.cni.bin_dirs)))
    try:
        for plugin in network.plugins:
            plugins.find(plugin.type)
    except CniError as error:
        fix = "apt-get install containernetworking-plugins, or see cni.bin_dirs"
        return fail("cni", f"{network.file}: {error.plugin!r}: {error.message}", fix)
    return ok("cni", f"network {network.name!r} from {network.file}")


async def iptables(host: Host) -> Finding:
    """Check for a program that CNI's plug-ins set up host ports and masquerading with."""
    if host.which("iptables") or host.which("nft"):
        return ok("firewall", "iptables or nft is installed, for host ports and masquerading")
    return warn(
        "firewall",
        "neither iptables nor nft found: host ports (portmap) and masquerading (ipMasq) will fail",
        "apt-get install iptables",
    )


# ------------------------------------------------------------------------------ cgroups, storage


async def cgroups(host: Host) -> Finding:
    """Report the cgroup layout and the driver that the kubelet should use."""
    layout = cgroup.find_layout()
    if not layout.roots:
        return fail("cgroups", "no cgroup hierarchy is mounted", "mount cgroup2 at /sys/fs/cgroup")
    return ok("cgroups", f"{layout.mode}; cgroup driver for the kubelet: {cgroup.find_driver(layout)}")


OVERLAY_TRIAL = (
    'mount -t overlay overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" "$1/merged"'
    ' && test "$(cat "$1/merged/file")" = husk && echo more > "$1/merged/file"'
)


async def overlayfs(host: Host) -> Finding:
    """Mount an overlay on the filesystem of `root`: another overlay and some network filesystems cannot
    have its upper directory."""
    root = _existing(Path(host.config.root))
    with tempfile.TemporaryDirectory(dir=root, prefix=".husk-doctor-") as trial:
        for name in ("lower", "upper", "work", "merged"):
            (Path(trial) / name).mkdir()
        (Path(trial) / "lower/file").write_text("husk")
        trial_run = await _run(["unshare", "--mount", "sh", "-c", OVERLAY_TRIAL, "sh", trial])
    if trial_run.returncode != 0:
        problem = " ".join(trial_run.stderr.split()) or f"exit status {trial_run.returncode}"
        return fail(
            "overlayfs", f"an overlay on {root} cannot be mounted: {problem}", "move `root` to ext4 or xfs"
        )
    return ok("overlayfs", f"overlays on {root} work")


async def space(host: Host) -> Finding:
    """Check the free space for images and writable layers."""
    root = _existing(Path(host.config.root))
    free = shutil.disk_usage(root).free
    text = f"{free / (1 << 30):.1f} GiB free on {root}"
    if free < SPACE_FAIL:
        return fail("space", text, "free space, or move `root`")
    return (
        warn("space", text, "free space for images, or move `root`")
        if free < SPACE_WARN
        else ok("space", text)
    )


def _existing(path: Path) -> Path:
    """Return the path itself or its nearest parent that exists."""
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
    Check("oom-score", oom_score),
    Check("libseccomp", seccomp),
    Check("guest", guest),
    Check("apparmor", apparmor),
    Check("acls", volume_acls),
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
    """Whether any check failed; warnings do not count."""
    return any(finding.result is CheckResult.FAIL for finding in findings)


def as_text(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield one line per finding: result, name, detail, and what to do."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        fix = f"  [fix: {finding.fix}]" if finding.fix else ""
        yield f"{finding.result:<4} {finding.name:<{width}}  {finding.detail}{fix}"


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as one JSON object, with `ok` for the whole."""
    document = {"ok": not failed(findings), "checks": findings}
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
