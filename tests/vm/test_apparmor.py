"""AppArmor: profiles of the host and the default one, in the guest's kernel of the real daemon.

Whether the machine's own kernel has AppArmor does not matter: what the daemon reads of it is mounted over in
the tests' namespace, with policy that apparmor_parser compiled. `tests/nested` has a kernel of a host's that
really loads it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.proto import runtime_v1_pb2 as api
from sandbox.apparmor.loaded import HOST_POLICY
from tests.conftest import Site
from tests.kit import apparmor
from tests.kit.cri import Cri, Pod
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
CURRENT = "cat /proc/self/attr/apparmor/current"
DENIES = "deny /tmp/** w"
DEFAULT = {"apparmor": api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)}
UNCONFINED = {"apparmor": api.SecurityProfile(profile_type=api.SecurityProfile.Unconfined)}


def local(name: str) -> dict[str, Any]:
    return {"apparmor": api.SecurityProfile(profile_type=api.SecurityProfile.Localhost, localhost_ref=name)}


def security(**fields: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(**fields))


def admin() -> dict[str, Any]:
    return {"capabilities": api.Capability(add_capabilities=["SYS_ADMIN"])}


@pytest.fixture(scope="module")
def host_policy(site: Site) -> Iterator[Path]:
    """What the daemon sees in place of the kernel's directory of loaded profiles."""
    directory = scratch_dir("security")
    policy = directory / HOST_POLICY.relative_to(HOST_POLICY.parents[1])
    (policy / "profiles").mkdir(parents=True)
    load(policy, "tmp-denied", apparmor.compiled(apparmor.profile("tmp-denied", DENIES)))
    load(policy, "garbage", b"no policy at all")
    site.namespace.run("mount", "--bind", str(directory), str(HOST_POLICY.parents[1]))
    yield policy
    site.namespace.run("umount", str(HOST_POLICY.parents[1]))


def load(policy: Path, name: str, binary: bytes) -> None:
    """As the kernel shows a profile once it is loaded."""
    place = policy / f"profiles/{name}.{len(list((policy / 'profiles').iterdir()))}"
    place.mkdir()
    (place / "name").write_text(f"{name}\n")
    (place / "raw_data").write_bytes(binary)


Outcome = Callable[..., tuple[int, str]]


@pytest.fixture
def outcome(cri: Cri, pod: Pod, host_policy: Path) -> Outcome:
    """Run a shell script in a new container; return exit code and output."""

    def run(script: str, **fields: Any) -> tuple[int, str]:
        return cri.run_to_end(pod, BUSYBOX, ["sh", "-c", script], linux=security(**fields))

    return run


def refusal(cri: Cri, pod: Pod, **fields: Any) -> str:
    with pytest.raises(grpc.RpcError) as fault:
        cri.create(pod, BUSYBOX, SLEEP, linux=security(**fields))
    assert fault.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return str(fault.value.details())


# ------------------------------------------------------------------------- profiles of the host


@pytest.mark.parametrize(
    "requested",
    [local("tmp-denied"), local("localhost/tmp-denied"), {"apparmor_profile": "localhost/tmp-denied"}],
    ids=["name", "prefixed", "older"],
)
def test_localhost_profile_denies(outcome: Outcome, requested: dict[str, Any]) -> None:
    code, output = outcome(f"{CURRENT}; echo x >/etc/new && echo x >/tmp/new", **requested)
    assert code != 0
    assert output.splitlines()[0] == "tmp-denied (enforce)"
    assert "/tmp/new: Permission denied" in output


def test_exec_enters_the_profile(cri: Cri, pod: Pod, host_policy: Path) -> None:
    box = cri.run(pod, BUSYBOX, SLEEP, linux=security(**local("tmp-denied")))
    done = cri.exec(box, "sh", "-c", f"{CURRENT}; echo x >/tmp/new")
    assert (done.code, done.stdout) == (1, "tmp-denied (enforce)\n")
    assert "Permission denied" in done.stderr
    assert json.loads(cri.call("ContainerStatus", container_id=box, verbose=True).info["info"])[
        "apparmor"
    ] == ("tmp-denied")


def test_profile_with_all_other_confinement_is_entered(outcome: Outcome) -> None:
    """A user, no_new_privs, seccomp and a root that is read-only."""
    seccomp = api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)
    code, output = outcome(
        f"{CURRENT}; grep -e NoNewPrivs -e ^Seccomp: /proc/self/status",
        run_as_user=api.Int64Value(value=1000),
        no_new_privs=True,
        seccomp=seccomp,
        readonly_rootfs=True,
        **local("tmp-denied"),
    )
    assert code == 0, output
    assert output.split() == ["tmp-denied", "(enforce)", "NoNewPrivs:", "1", "Seccomp:", "2"]


def test_containers_of_one_pod_have_different_profiles(cri: Cri, pod: Pod, host_policy: Path) -> None:
    requests: tuple[dict[str, Any], ...] = (local("tmp-denied"), DEFAULT, {}, UNCONFINED)
    boxes = [cri.run(pod, BUSYBOX, SLEEP, linux=security(**requested)) for requested in requests]
    found = [cri.exec(box, *CURRENT.split()).stdout.strip() for box in boxes]
    assert found == ["tmp-denied (enforce)", "husk-default (enforce)", "unconfined", "unconfined"]


@pytest.mark.parametrize("requested", [local("nonesuch"), {"apparmor_profile": "localhost/nonesuch"}])
def test_profile_that_is_not_loaded_is_rejected(
    cri: Cri, pod: Pod, host_policy: Path, requested: dict[str, Any]
) -> None:
    assert "apparmor.localhost_ref: 'nonesuch' is not loaded" in refusal(cri, pod, **requested)


def test_newer_field_overrides_the_older(outcome: Outcome) -> None:
    code, output = outcome(CURRENT, apparmor_profile="localhost/nonesuch", **local("tmp-denied"))
    assert (code, output.strip()) == (0, "tmp-denied (enforce)")


def test_policy_that_the_guest_rejects_fails_the_start(cri: Cri, pod: Pod, host_policy: Path) -> None:
    box = cri.create(pod, BUSYBOX, SLEEP, linux=security(**local("garbage")))
    with pytest.raises(grpc.RpcError) as fault:
        cri.start(box)
    assert "garbage: the guest's kernel refuses its policy: " in str(fault.value.details())
    assert cri.status(box).reason == "StartError"


def test_localhost_profile_on_host_without_apparmor_is_rejected(
    cri: Cri, pod: Pod, site: Site, host_policy: Path
) -> None:
    site.namespace.run("mount", "-t", "tmpfs", "none", str(HOST_POLICY.parents[1]))
    try:
        message = refusal(cri, pod, **local("tmp-denied"))
    finally:
        site.namespace.run("umount", str(HOST_POLICY.parents[1]))
    assert "apparmor.localhost_ref: 'tmp-denied': this host's kernel has no AppArmor" in message


# ------------------------------------------------------------------------- the default profile


@pytest.mark.parametrize(
    "deed",
    [
        "echo h >/proc/sysrq-trigger",
        "echo 1 >/proc/sys/vm/drop_caches",
        "echo core >/proc/sys/kernel/core_pattern",
        "mount -t tmpfs none /mnt",
        "mount -t proc none /mnt",
    ],
)
@pytest.mark.parametrize("requested", [DEFAULT, {"apparmor_profile": "runtime/default"}, UNCONFINED])
def test_default_profile_denies(outcome: Outcome, deed: str, requested: dict[str, Any]) -> None:
    """What a container's root could do without, with nothing masked or read-only."""
    script = f"mount -o remount,rw /proc/sys 2>/dev/null; mkdir -p /mnt; {deed}"
    code, output = outcome(script, **admin(), **requested)
    assert (code == 0) is (requested is UNCONFINED), output


def test_default_profile_allows_ordinary_programs(outcome: Outcome) -> None:
    deeds = [
        "echo x >/tmp/file && mv /tmp/file /etc/file && rm /etc/file",
        "sleep 100 & kill $! && ! wait $!",
        "(echo hello | nc -l -p 4000 &) ; sleep 1; nc 127.0.0.1 4000 </dev/null | grep -q hello",
        "mkfifo /tmp/fifo && (echo x >/tmp/fifo &) && read line </tmp/fifo",
        "echo x >/tmp/file && chown 5 /tmp/file && ls /proc/1/fd /sys/class/net/lo >/dev/null",
        "cat /proc/meminfo /proc/sys/kernel/osrelease >/dev/null",
        "echo 1000 >/proc/self/oom_score_adj",
    ]
    for deed in deeds:
        code, output = outcome(deed, **DEFAULT)
        assert code == 0, f"{deed}: {output}"


def test_confined_container_receives_signals(cri: Cri, pod: Pod) -> None:
    script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    box = cri.run(pod, BUSYBOX, ["sh", "-c", script], linux=security(**DEFAULT))
    eventually_sync(lambda: cri.log(box), timeout_s=30)
    cri.stop(box, timeout=20)
    assert cri.status(box).exit_code == 5


def test_privileged_container_is_unconfined_unless_requested(outcome: Outcome) -> None:
    script = f"{CURRENT}; mkdir -p /mnt; mount -t tmpfs none /mnt"
    assert outcome(script, privileged=True) == (0, "unconfined\n")
    code, output = outcome(script, privileged=True, **DEFAULT)
    assert code != 0
    assert output.startswith("husk-default (enforce)\n")


def test_confined_container_has_a_terminal(cri: Cri, pod: Pod) -> None:
    command = ["sh", "-c", f"{CURRENT}; tty"]
    code, output = cri.run_to_end(pod, BUSYBOX, command, tty=True, linux=security(**DEFAULT))
    assert (code, output.split()) == (0, ["husk-default", "(enforce)", "/dev/pts/0"]), shlex.quote(output)
