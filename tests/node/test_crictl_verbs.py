"""The rest of crictl: filters, parts of logs, bulk commands. Every verb is tested."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.kit.daemon import Daemon
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.node.conftest import Crictl, Running

pytestmark = pytest.mark.node

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
SETUID = f"{HOST}/husk/setuid:1"
SLEEP = ["sleep", "3600"]
# commands of crictl itself, which call no runtime
OWN = {"completion", "config", "help"}


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Running:
    """Return a pod with a container that prints ten lines and sleeps."""
    crictl.run("pull", BUSYBOX)
    script = "for n in 1 2 3 4 5; do echo line $n; echo error $n >&2; done; exec sleep 3600"
    return crictl.start("verbs", "talks", BUSYBOX, ["sh", "-c", script], labels={"app": "verbs"})


def test_every_verb_of_crictl_is_tested(crictl: Crictl) -> None:
    said = subprocess.run([crictl.binary, "--help"], capture_output=True, text=True, check=True).stdout
    listed = said.partition("COMMANDS:")[2].partition("GLOBAL OPTIONS:")[0]
    verbs = set(re.findall(r"^   ([a-z-]+)", listed, re.MULTILINE)) - OWN
    assert len(verbs) > 25
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_crictl*.py"))
    assert {verb for verb in verbs if f'"{verb}"' not in tests} == set()


def other(crictl: Crictl, pod: Running, name: str, command: list[str], **fields: object) -> str:
    file = crictl.container_file(name, BUSYBOX, command, **fields)
    return crictl.say("create", pod.pod, file, pod.pod_file)


# ------------------------------------------------------------------------------------------- ps


def test_ps_filters_select_containers(crictl: Crictl, pod: Running) -> None:
    # the label from which crictl reads a container's namespace, as the kubelet sets it
    labels = {"tier": "back", "io.kubernetes.pod.namespace": "default"}
    created = other(crictl, pod, "silent", SLEEP, labels=labels)
    everything = {pod.container, created}
    assert set(crictl.say("ps", "-aq", "--pod", pod.pod).split()) == everything
    for words, found in {
        ("--name", "^tal"): {pod.container},
        ("--name", "unknown"): set(),
        ("--state", "created"): {created},
        ("--state", "running"): {pod.container},
        ("--label", "tier=back"): {created},
        ("--label", "tier=back", "--label", "no=thing"): set(),
        ("--image", BUSYBOX): everything,
        ("--namespace", "default"): {created},
        ("--namespace", "^other$"): set(),
        ("--latest",): {created},
        ("--last", "2"): everything,
        ("--id", created[:13], "--state", "running"): set(),
    }.items():
        assert set(crictl.say("ps", "-aq", *words).split()) == found, words
    table = crictl.say("ps", "-a", "--no-trunc", "-r")
    assert created in table and BUSYBOX in table


def test_pods_filters_select_pods(crictl: Crictl, pod: Running) -> None:
    second = crictl.say("runp", crictl.pod_file("verbs-two", labels={"app": "two"}))
    for words, found in {
        (): {pod.pod, second},
        ("--latest",): {second},
        ("--last", "1"): {second},
        ("--namespace", "default", "--name", "^verbs$"): {pod.pod},
        ("--label", "app=two"): {second},
        ("--state", "notready"): set(),
    }.items():
        assert set(crictl.say("pods", "-q", *words).split()) == found, words


# ----------------------------------------------------------------------------------------- logs


def test_logs_options_select_parts_of_a_log(crictl: Crictl, pod: Running) -> None:
    eventually_sync(
        lambda: crictl.run("logs", pod.container).stderr, until=lambda text: "error 5" in text, timeout_s=30
    )
    both = crictl.run("logs", pod.container)
    assert both.stdout.splitlines() == [f"line {n}" for n in range(1, 6)]
    assert both.stderr.splitlines() == [f"error {n}" for n in range(1, 6)]
    tail = crictl.run("logs", "--tail", "3", pod.container)
    assert len((tail.stdout + tail.stderr).splitlines()) == 3
    assert crictl.run("logs", "--stream", "stderr", pod.container).stdout == ""
    stamped = crictl.run("logs", "--timestamps", pod.container).stdout.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\S+ line 1", stamped[0])
    assert crictl.run("logs", "--limit-bytes", "6", pod.container).stdout.startswith("line")


def test_logs_since_a_time_omits_earlier_lines(crictl: Crictl, pod: Running) -> None:
    script = "echo early; sleep 3; echo late; exec sleep 3600"
    container = other(crictl, pod, "slow", ["sh", "-c", script])
    crictl.run("start", container)
    eventually_sync(lambda: crictl.say("logs", container), until=lambda text: "late" in text, timeout_s=30)
    early, late = crictl.run("logs", "--timestamps", container).stdout.splitlines()
    moment = late.split()[0]
    assert crictl.say("logs", "--since", moment, container) == "late"
    assert crictl.say("logs", "--since", early.split()[0], container) == "early\nlate"


def test_logs_follow_continues_over_reopen_to_the_end(crictl: Crictl, pod: Running) -> None:
    container = other(crictl, pod, "counts", ["sh", "-c", "for n in 1 2 3; do echo $n; sleep 1; done"])
    crictl.run("start", container)
    path = Path(crictl.json("inspect", container)["status"]["logPath"])
    with subprocess.Popen(
        crictl.command("logs", "-f", container), stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "1\n"
        path.rename(path.with_suffix(".1"))
        crictl.run("logs", "--reopen", container)
        eventually_sync(path.exists)
        assert follower.stdout.read() == "2\n3\n"
        assert follower.wait(30) == 0


# --------------------------------------------------------------------------------------- inspect


def test_inspect_reports_process_and_runtime_spec(crictl: Crictl, pod: Running) -> None:
    info = crictl.json("inspect", pod.container)["info"]
    sandbox = crictl.json("inspectp", pod.pod)["info"]
    assert info["sandboxID"] == pod.pod
    assert info["privileged"] is False
    # `pid` is the VM on this host; the container's process is in the guest
    assert info["pid"] == sandbox["pid"]
    assert info["guestPid"] == sandbox["guestPids"][pod.container] > 1
    spec = info["runtimeSpec"]
    assert spec["process"]["args"][:2] == ["sh", "-c"]
    assert any(entry.startswith("PATH=") for entry in spec["process"]["env"])
    assert "CAP_KILL" in spec["process"]["capabilities"]["effective"]
    mounts = {mount["destination"]: mount for mount in spec["mounts"]}
    assert mounts["/proc"]["type"] == "proc"
    assert "nosuid" in mounts["/proc"]["options"]
    assert "memory.oom.group" not in spec["linux"].get("resources", {}).get("unified", {})
    crictl.run("update", "--memory", str(64 << 20), pod.container)
    files = crictl.json("inspect", pod.container)["info"]["runtimeSpec"]["linux"]["resources"]["unified"]
    assert files["memory.max"] == str(64 << 20)
    created = crictl.json("inspect", other(crictl, pod, "waits", SLEEP))["info"]
    assert "pid" not in created and created["runtimeSpec"]["process"]["args"] == SLEEP


def test_inspectp_reports_vm_and_phases(crictl: Crictl, pod: Running) -> None:
    info = crictl.json("inspectp", pod.pod)["info"]
    assert "qemu" in Path(f"/proc/{info['pid']}/cmdline").read_text()
    assert Path(info["console"]).is_file()
    assert Path(info["netns"]).exists()
    assert (info["handler"], info["isolation"]) == ("", "vm")
    assert info["accelerator"] in ("kvm", "tcg")
    assert info["source"] in ("template", "boot")
    assert info["size"]["memoryMiB"] >= 256
    assert [nic["name"] for nic in info["interfaces"]] == ["eth0"]
    # the waterfall of its start
    phases = {phase["name"]: phase for phase in info["phases"]}
    assert {"network", "vm", "guest"} <= set(phases)
    assert all(phase["beginSeconds"] <= phase["endSeconds"] for phase in phases.values())


# -------------------------------------------------------------------------------------- the rest


def test_update_runtime_config_keeps_a_valid_pod_cidr(crictl: Crictl, daemon: Daemon) -> None:
    crictl.run("update-runtime-config", "--pod-cidr", "10.77.0.0/16")
    refused = crictl.run("update-runtime-config", "--pod-cidr", "10.77.0.0/99", check=False)
    assert refused.returncode != 0
    assert "10.77.0.0/99" in refused.stderr
    kept = daemon.root / "cni" / "pod-cidr"  # for the next start of the daemon
    assert kept.read_text().strip() == "10.77.0.0/16"
    kept.unlink()


def test_checkpoint_is_refused_as_not_implemented(crictl: Crictl, pod: Running) -> None:
    refused = crictl.run("checkpoint", "--export=/tmp/unwritten", pod.container, check=False)
    assert refused.returncode != 0
    assert "husk does not implement CheckpointContainer" in refused.stderr


def test_several_containers_in_one_command_are_handled(crictl: Crictl, pod: Running) -> None:
    several = [other(crictl, pod, f"several-{number}", SLEEP) for number in range(3)]
    crictl.run("start", *several)
    assert set(several) < set(crictl.say("ps", "-q").split())
    crictl.run("stop", "--timeout", "0", *several)
    assert set(crictl.say("ps", "-aq", "--state", "exited").split()) == set(several)
    crictl.run("rm", *several)
    running = other(crictl, pod, "again", SLEEP)
    crictl.run("start", running)
    assert crictl.run("rm", running, check=False).returncode != 0, "it runs"
    crictl.run("rm", "--force", running)
    assert crictl.say("ps", "-aq", "--pod", pod.pod) == pod.container


def test_rmi_prune_removes_unused_images(crictl: Crictl, pod: Running) -> None:
    for image in (WEB, SETUID):
        crictl.run("pull", image)
    crictl.run("rmi", "--prune")
    tags = {tag for image in crictl.json("images")["images"] for tag in image["repoTags"]}
    assert BUSYBOX in tags, "a container uses it"
    assert not tags & {WEB, SETUID}


def test_rmp_all_with_force_removes_everything(crictl: Crictl, pod: Running) -> None:
    """The last test of the module, as it removes the pod of the others."""
    crictl.say("runp", crictl.pod_file("stopped"))
    crictl.run("stopp", crictl.say("pods", "-q", "--name", "stopped"))
    began = time.monotonic()
    crictl.run("rmp", "-fa")
    assert time.monotonic() - began < 60
    assert crictl.say("pods", "-q") == ""
    assert crictl.say("ps", "-aq") == ""
    crictl.run("rmi", "--all")
    assert crictl.json("images")["images"] == []
