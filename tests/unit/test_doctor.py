"""`husk doctor`: each check on a host that has what it checks for, and on one that has not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

import tests.drivers  # noqa: F401 -- registers a driver without a VM
from cri.cli import doctor
from cri.cli.doctor import Check, Host
from cri.config import Cni, Config, HandlerTable
from sandbox.host.findings import CheckResult, Finding, fail, ok
from sandbox.vm_pods.boot_image import ImageFacts
from sandbox.vmm import virtiofsd
from sandbox.vmm.qemu import host as qemu_host
from tests.kit.leaks import mounts_naming


def host(tmp_path: Path, **changes: object) -> Host:
    cni = Cni(conf_dir=str(tmp_path / "net.d"), bin_dirs=(str(tmp_path / "bin"),))
    settings: dict[str, object] = {"root": str(tmp_path / "root"), "run": str(tmp_path / "run"), "cni": cni}
    return Host(Config(**settings | changes), fs=tmp_path)  # type: ignore[arg-type]


def plugin(tmp_path: Path, name: str) -> None:
    (tmp_path / "bin").mkdir(exist_ok=True)
    program = tmp_path / "bin" / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


def network(tmp_path: Path, text: str, name: str = "10-net.conflist") -> None:
    (tmp_path / "net.d").mkdir(exist_ok=True)
    (tmp_path / "net.d" / name).write_text(text)


LIST = json.dumps(
    {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, {"type": "portmap"}]}
)


async def test_every_check_has_one_finding_with_its_name(tmp_path: Path) -> None:
    findings = await doctor.examine(host(tmp_path))
    assert [finding.name for finding in findings] == [
        check.name for check in doctor.checks_of(host(tmp_path))
    ]
    assert all(finding.detail for finding in findings)


@pytest.mark.parametrize(
    ("held", "expected"), [(1 << 24, CheckResult.OK), ((1 << 41) - 1 - (1 << 24), CheckResult.WARN)]
)
async def test_missing_right_to_protect_vms_from_the_oom_killer_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, expected: CheckResult
) -> None:
    monkeypatch.setattr(doctor, "effective_capabilities", lambda: held)
    finding = await doctor.oom_score(host(tmp_path))
    assert finding.result is expected
    assert ("CAP_SYS_RESOURCE is missing" in finding.detail) == (expected is CheckResult.WARN)


def test_drivers_of_configured_handlers_bring_their_checks(tmp_path: Path) -> None:
    def names(**changes: object) -> set[str]:
        return {check.name for check in doctor.checks_of(host(tmp_path, **changes))}

    process = HandlerTable(hypervisor="process")
    assert "qemu" in names() and "process" not in names()
    assert {"qemu", "process"} <= names(handlers={"other": process}), "the default handler has QEMU"
    only = names(handlers={"other": process}, default_handler="other")
    assert "process" in only and not {"qemu", "virtiofsd", "vhost-net"} & only


async def test_every_failure_has_a_remedy(tmp_path: Path) -> None:
    findings = await doctor.examine(host(tmp_path))
    assert [finding for finding in findings if finding.result is CheckResult.FAIL and not finding.fix] == []


async def test_apparmor_names_the_available_profiles(tmp_path: Path) -> None:
    there = host(tmp_path)
    finding = await doctor.apparmor(there)
    assert finding.result is CheckResult.WARN
    assert "husk guest build" in finding.fix
    image = tmp_path / "root/guest/current"
    image.mkdir(parents=True)
    (image / "apparmor").write_bytes(b"compiled")
    finding = await doctor.apparmor(there)
    assert (finding.result, "no other profiles" in finding.detail) == (CheckResult.OK, True)
    (tmp_path / "sys/kernel/security/apparmor/policy").mkdir(parents=True)
    finding = await doctor.apparmor(there)
    assert (finding.result, "loaded on this host" in finding.detail) == (CheckResult.OK, True)


async def test_acls_are_enforced_on_volumes_with_the_module_only(tmp_path: Path) -> None:
    there = host(tmp_path)
    assert "no guest image" in (await doctor.volume_acls(there)).detail
    guest = tmp_path / "root/guest"
    for name, modules, result in (("a", (), CheckResult.WARN), ("b", ("husk_acl",), CheckResult.OK)):
        (guest / name).mkdir(parents=True)
        facts = ImageFacts(kernel_version="6.1", modules=modules)
        (guest / name / "image.json").write_bytes(msgspec.json.encode(facts))
        (guest / "current").unlink(missing_ok=True)
        (guest / "current").symlink_to(name)
        assert (await doctor.volume_acls(there)).result is result


async def test_check_that_raises_is_a_failure_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def broken(host: Host) -> Finding:
        raise RuntimeError("surprise")

    async def fine(host: Host) -> Finding:
        return ok("fine", "well")

    monkeypatch.setattr(doctor, "checks_of", lambda host: (Check("broken", broken), Check("fine", fine)))
    findings = await doctor.examine(host(tmp_path))
    assert [(finding.name, finding.result) for finding in findings] == [
        ("broken", CheckResult.FAIL),
        ("fine", CheckResult.OK),
    ]
    assert "surprise" in findings[0].detail


async def test_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(qemu_host, "PROGRAM", "qemu-that-is-not-there")
    monkeypatch.setattr(virtiofsd.Prober.__init__, "__defaults__", ((str(tmp_path / "virtiofsd"),),))
    checks = {check.name: check.run for check in doctor.checks_of(host(tmp_path))}
    for name, package in (("qemu", "qemu-system-x86"), ("virtiofsd", "virtiofsd")):
        finding = await checks[name](host(tmp_path))
        assert finding.result is CheckResult.FAIL
        assert package in finding.fix


async def test_guest_without_image_names_the_command_that_builds_it(tmp_path: Path) -> None:
    finding = await doctor.guest(host(tmp_path))
    assert (finding.result, finding.fix) == (CheckResult.FAIL, "husk guest build")


async def test_guest_with_missing_kernel_of_a_handler_fails(tmp_path: Path) -> None:
    finding = await doctor.guest(host(tmp_path, handlers={"own": HandlerTable(kernel="/nowhere/vmlinux")}))
    assert finding.result is CheckResult.FAIL
    assert "handlers.own: /nowhere/vmlinux" in finding.detail


async def test_accelerator_without_kvm_is_tcg_and_warns(tmp_path: Path) -> None:
    finding = await doctor.accelerator(host(tmp_path))
    assert finding.result is CheckResult.WARN
    assert "tcg" in finding.detail and "there is no" in finding.detail
    assert "does not promise" in finding.detail and 'accelerator = "kvm"' in finding.fix


async def test_missing_device_fails_or_warns_by_its_importance(tmp_path: Path) -> None:
    missing = host(tmp_path)
    checks = {check.name: check.run for check in doctor.checks_of(missing)}
    assert (await checks["tun"](missing)).result is CheckResult.FAIL
    assert (await checks["vhost-net"](missing)).result is CheckResult.WARN
    assert (await checks["vhost-vsock"](missing)).result is CheckResult.OK
    (tmp_path / "dev/net").mkdir(parents=True)
    (tmp_path / "dev/net/tun").symlink_to("/dev/null")
    assert (await checks["tun"](missing)).result is CheckResult.OK


async def test_cni_without_configuration_warns(tmp_path: Path) -> None:
    finding = await doctor.cni(host(tmp_path))
    assert finding.result is CheckResult.WARN
    assert "pods cannot start yet" in finding.detail


async def test_cni_with_missing_plugin_fails(tmp_path: Path) -> None:
    network(tmp_path, LIST)
    plugin(tmp_path, "bridge")
    finding = await doctor.cni(host(tmp_path))
    assert finding.result is CheckResult.FAIL
    assert "'portmap'" in finding.detail and "containernetworking-plugins" in finding.fix
    plugin(tmp_path, "portmap")
    finding = await doctor.cni(host(tmp_path))
    assert finding.result is CheckResult.OK
    assert "'pods'" in finding.detail


async def test_cni_with_broken_file_fails(tmp_path: Path) -> None:
    network(tmp_path, "{")
    finding = await doctor.cni(host(tmp_path))
    assert finding.result is CheckResult.FAIL
    assert "10-net.conflist" in finding.detail


async def test_host_pods_without_programs_warns_unless_they_are_refused(tmp_path: Path) -> None:
    nothing = Host(Config(), fs=tmp_path, which=lambda name: None)
    finding = await doctor.host_pods(nothing)
    assert finding.result is CheckResult.WARN
    assert finding.fix == "apt-get install conmon crun"
    both = Host(Config(), fs=tmp_path, which=lambda name: f"/usr/bin/{name}")
    assert (await doctor.host_pods(both)).result is CheckResult.OK
    refusing = Config(default_handler="vms", handlers={"vms": HandlerTable(host_pods="refuse")})
    assert (
        await doctor.host_pods(Host(refusing, fs=tmp_path, which=lambda name: None))
    ).result is CheckResult.OK


async def test_firewall_without_iptables_and_nft_warns(tmp_path: Path) -> None:
    nothing = Host(Config(), fs=tmp_path, which=lambda name: None)
    assert (await doctor.iptables(nothing)).result is CheckResult.WARN
    nft = Host(Config(), fs=tmp_path, which=lambda name: "/sbin/nft" if name == "nft" else None)
    assert (await doctor.iptables(nft)).result is CheckResult.OK


def test_overlay_trial_leaves_no_mount_and_no_file(tmp_path: Path) -> None:
    finding = asyncio.run(doctor.overlayfs(host(tmp_path)))
    assert finding.result in (CheckResult.OK, CheckResult.FAIL)
    assert list(tmp_path.iterdir()) == []
    assert mounts_naming(str(tmp_path)) == frozenset()


async def test_overlay_that_cannot_be_mounted_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OVERLAY_TRIAL", "echo no such luck >&2; exit 32")
    finding = await doctor.overlayfs(host(tmp_path))
    assert finding.result is CheckResult.FAIL
    assert "no such luck" in finding.detail


@pytest.mark.parametrize(
    ("fail_below", "warn_below", "expected"),
    [(0, 0, CheckResult.OK), (0, 1 << 60, CheckResult.WARN), (1 << 60, 1 << 61, CheckResult.FAIL)],
)
async def test_space_below_its_limits_warns_or_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_below: int, warn_below: int, expected: CheckResult
) -> None:
    monkeypatch.setattr(doctor, "SPACE_FAIL", fail_below)
    monkeypatch.setattr(doctor, "SPACE_WARN", warn_below)
    assert (await doctor.space(host(tmp_path))).result is expected


def test_output_as_text_and_as_json() -> None:
    findings = [ok("a", "well"), fail("longer", "gone", "apt-get install it")]
    assert list(doctor.as_text(findings)) == [
        "ok   a       well",
        "fail longer  gone  [fix: apt-get install it]",
    ]
    document = json.loads(doctor.as_json(findings))
    assert document["ok"] is False
    assert document["checks"][1] == {
        "name": "longer",
        "result": "fail",
        "detail": "gone",
        "fix": "apt-get install it",
    }
    assert doctor.failed(findings) and not doctor.failed(findings[:1])
