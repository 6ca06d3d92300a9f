"""The usual flows of pods, containers and images, driven by the real crictl."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.conftest import Site
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST
from tests.node.conftest import Crictl, Running

pytestmark = pytest.mark.node

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
DOCKER = f"{HOST}/husk/docker:1"


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Running:
    """Return one pod with a web server, for the tests that read it or run something in it."""
    crictl.run("pull", WEB)
    crictl.run("pull", BUSYBOX)
    return crictl.start("web", "httpd", WEB, [], labels={"app": "web"})


def page(site: Site, crictl: Crictl, pod: str) -> str:
    ip = crictl.json("inspectp", pod)["status"]["network"]["ip"]

    return eventually_sync(lambda: site.namespace.fetch(ip, 80), timeout_s=20, retry_on=(OSError,))


def test_version_and_info_name_the_runtime(crictl: Crictl) -> None:
    text = crictl.say("version")
    assert "RuntimeName:  husk" in text
    assert "RuntimeApiVersion:  v1" in text
    info = crictl.json("info")
    conditions = {each["type"]: each["status"] for each in info["status"]["conditions"]}
    assert conditions == {"RuntimeReady": True, "NetworkReady": True}


def test_runtime_config_names_the_cgroup_driver(crictl: Crictl) -> None:
    answer = crictl.say("runtime-config")
    assert "CGROUPFS" in answer or "SYSTEMD" in answer


def test_pod_web_server_answers_and_logs(crictl: Crictl, site: Site, pod: Running) -> None:
    assert page(site, crictl, pod.pod) == "hello from the pod\n"

    def log() -> str:
        done = crictl.run("logs", pod.container)
        return done.stdout + done.stderr

    eventually_sync(log, until=lambda text: "200" in text)


def test_exec_sync_output_and_exit_code_arrive(crictl: Crictl, pod: Running) -> None:
    release = crictl.say("exec", "--sync", pod.container, "uname", "-r")
    assert release
    assert release != platform.release()
    failed = crictl.run("exec", "--sync", pod.container, "sh", "-c", "echo heard >&2; exit 42", check=False)
    assert failed.returncode != 0
    assert "42" in failed.stderr
    assert "heard" in failed.stdout + failed.stderr


def test_exec_sync_after_timeout_fails(crictl: Crictl, pod: Running) -> None:
    late = crictl.run("exec", "--sync", "--timeout", "1", pod.container, "sleep", "9876", check=False)
    assert late.returncode != 0
    assert "DeadlineExceeded" in late.stderr or "timed out" in late.stderr or "timeout" in late.stderr


def test_list_filters_select_pods_and_containers(crictl: Crictl, pod: Running) -> None:
    assert crictl.say("pods", "-q") == pod.pod
    assert crictl.say("pods", "-q", "--name", "web", "--label", "app=web", "--state", "Ready") == pod.pod
    assert crictl.say("pods", "-q", "--id", pod.pod[:13]) == pod.pod
    assert crictl.say("pods", "-q", "--label", "app=other") == ""
    assert crictl.say("ps", "-q") == pod.container
    assert crictl.say("ps", "-q", "--pod", pod.pod[:13]) == pod.container
    assert crictl.say("ps", "-q", "--id", pod.container[:13]) == pod.container
    assert pod.container[:13] in crictl.say("ps")
    assert pod.pod[:13] in crictl.say("pods")


def test_inspect_reports_status_and_accepts_short_ids(crictl: Crictl, pod: Running) -> None:
    status = crictl.json("inspect", pod.container)["status"]
    assert (status["id"], status["state"]) == (pod.container, "CONTAINER_RUNNING")
    assert status["image"]["image"]
    assert status["imageRef"]
    assert Path(status["logPath"]).is_file()
    assert crictl.json("inspect", pod.container[:13])["status"]["id"] == pod.container
    sandbox = crictl.json("inspectp", pod.pod)
    assert sandbox["status"]["state"] == "SANDBOX_READY"
    assert sandbox["status"]["labels"] == {"app": "web"}
    assert sandbox["info"]


def test_container_is_created_started_updated_stopped_and_removed(crictl: Crictl, pod: Running) -> None:
    file = crictl.container_file("life", BUSYBOX, ["sh", "-c", "echo begun; exec sleep 3600"])
    container = crictl.say("create", pod.pod, file, pod.pod_file)
    assert crictl.say("ps", "-aq", "--state", "Created") == container
    crictl.run("start", container)
    assert container in crictl.say("ps", "-q").split()
    eventually_sync(lambda: crictl.say("logs", container), until=lambda text: text == "begun")
    crictl.run("update", "--memory", str(64 << 20), container)
    crictl.run("stop", "--timeout", "0", container)
    status = crictl.json("inspect", container)["status"]
    assert (status["state"], status["exitCode"], status["reason"]) == ("CONTAINER_EXITED", 137, "Error")
    crictl.run("rm", container)
    assert container not in crictl.say("ps", "-aq").split()
    assert crictl.run("inspect", container, check=False).returncode != 0


def test_pod_is_run_stopped_and_removed(crictl: Crictl) -> None:
    pod = crictl.say("runp", crictl.pod_file("life"))
    assert crictl.say("pods", "-q", "--name", "life") == pod
    crictl.run("stopp", pod)
    assert crictl.say("pods", "-q", "--name", "life", "--state", "NotReady") == pod
    crictl.run("rmp", pod)
    assert crictl.say("pods", "-q", "--name", "life") == ""
    assert crictl.run("inspectp", pod, check=False).returncode != 0


def test_remove_ready_pod_with_force_removes_its_containers(crictl: Crictl) -> None:
    pod_file = crictl.pod_file("forced")
    pod = crictl.say("runp", pod_file)
    container = crictl.say(
        "create", pod, crictl.container_file("inside", BUSYBOX, ["sleep", "3600"]), pod_file
    )
    crictl.run("start", container)
    crictl.run("rmp", "--force", pod)
    assert container not in crictl.say("ps", "-aq").split()


def test_run_creates_pod_and_container_at_once(crictl: Crictl) -> None:
    pod_file = crictl.pod_file("one-step")
    file = crictl.container_file("one", BUSYBOX, ["sleep", "3600"])
    container = crictl.say("run", file, pod_file)
    assert container in crictl.say("ps", "-q").split()


def test_image_is_pulled_listed_inspected_and_removed(crictl: Crictl) -> None:
    id = crictl.say("pull", DOCKER).split()[-1]
    listed = {tag: image for image in crictl.json("images")["images"] for tag in image["repoTags"]}
    assert DOCKER in listed
    assert listed[DOCKER]["id"] in id or id in DOCKER
    status = crictl.json("inspecti", DOCKER)["status"]
    assert (status["id"], status["repoTags"]) == (listed[DOCKER]["id"], [DOCKER])
    assert int(status["size"]) > 0
    crictl.run("rmi", DOCKER)
    assert crictl.run("inspecti", DOCKER, check=False).returncode != 0


def test_imagefsinfo_reports_mountpoint_and_usage(crictl: Crictl) -> None:
    usage = crictl.json("imagefsinfo")["status"]["imageFilesystems"][0]
    assert Path(usage["fsId"]["mountpoint"]).is_dir()
    assert int(usage["usedBytes"]["value"]) > 0


def test_pull_of_missing_image_names_it(crictl: Crictl) -> None:
    missing = crictl.run("pull", f"{HOST}/husk/nonesuch:1", check=False)
    assert missing.returncode != 0
    assert "nonesuch" in missing.stderr
