"""The flows that people and kubelets need, by the real crictl on the real daemon."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cri import Cri
from tests.kit.registry import HOST
from tests.node.conftest import Crictl, Running

pytestmark = pytest.mark.node

BUSYBOX = f"{HOST}/husk/busybox:1"
WEB = f"{HOST}/husk/web:1"
DOCKER = f"{HOST}/husk/docker:1"


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Running:
    """One pod with a web server, for the tests that only look or run something in it."""
    crictl.run("pull", WEB)
    crictl.run("pull", BUSYBOX)
    return crictl.start("web", "httpd", WEB, [], labels={"app": "web"})


def page(site: Any, crictl: Crictl, pod: str) -> str:
    ip = crictl.json("inspectp", pod)["status"]["network"]["ip"]

    def look() -> str:
        try:
            return str(site.namespace.fetch(ip, 80))
        except OSError:
            return ""

    return str(Cri.wait_for(look, bool, 20))


def test_version_and_info(crictl: Crictl) -> None:
    text = crictl.say("version")
    assert "RuntimeName:  husk" in text
    assert "RuntimeApiVersion:  v1" in text
    info = crictl.json("info")
    conditions = {each["type"]: each["status"] for each in info["status"]["conditions"]}
    assert conditions == {"RuntimeReady": True, "NetworkReady": True}


def test_runtime_config(crictl: Crictl) -> None:
    answer = crictl.say("runtime-config")
    assert "CGROUPFS" in answer or "SYSTEMD" in answer


def test_page_from_the_pod(crictl: Crictl, site: Any, pod: Running) -> None:
    assert page(site, crictl, pod.pod) == "hello from the pod\n"

    def log() -> str:
        said = crictl.run("logs", pod.container)
        return str(said.stdout + said.stderr)

    assert "200" in Cri.wait_for(log, lambda text: "200" in text, 10)


def test_exec_sync(crictl: Crictl, pod: Running) -> None:
    release = crictl.say("exec", "--sync", pod.container, "uname", "-r")
    assert release
    assert release != platform.release()
    failed = crictl.run("exec", "--sync", pod.container, "sh", "-c", "echo heard >&2; exit 42", check=False)
    assert failed.returncode != 0
    assert "42" in failed.stderr
    assert "heard" in failed.stdout + failed.stderr


def test_exec_sync_timeout(crictl: Crictl, pod: Running) -> None:
    late = crictl.run("exec", "--sync", "--timeout", "1", pod.container, "sleep", "9876", check=False)
    assert late.returncode != 0
    assert "DeadlineExceeded" in late.stderr or "timed out" in late.stderr or "timeout" in late.stderr


def test_lists_and_filters(crictl: Crictl, pod: Running) -> None:
    assert crictl.say("pods", "-q") == pod.pod
    assert crictl.say("pods", "-q", "--name", "web", "--label", "app=web", "--state", "Ready") == pod.pod
    assert crictl.say("pods", "-q", "--id", pod.pod[:13]) == pod.pod
    assert crictl.say("pods", "-q", "--label", "app=other") == ""
    assert crictl.say("ps", "-q") == pod.container
    assert crictl.say("ps", "-q", "--pod", pod.pod[:13]) == pod.container
    assert crictl.say("ps", "-q", "--id", pod.container[:13]) == pod.container
    assert pod.container[:13] in crictl.say("ps")
    assert pod.pod[:13] in crictl.say("pods")


def test_inspect(crictl: Crictl, pod: Running) -> None:
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


def test_life_of_a_container(crictl: Crictl, pod: Running) -> None:
    file = crictl.container_file("life", BUSYBOX, ["sh", "-c", "echo begun; exec sleep 3600"])
    container = crictl.say("create", pod.pod, file, pod.pod_file)
    assert crictl.say("ps", "-aq", "--state", "Created") == container
    crictl.run("start", container)
    assert container in crictl.say("ps", "-q").split()
    Cri.wait_for(lambda: crictl.say("logs", container), lambda text: text == "begun")
    crictl.run("update", "--memory", str(64 << 20), container)
    crictl.run("stop", "--timeout", "0", container)
    status = crictl.json("inspect", container)["status"]
    assert (status["state"], status["exitCode"], status["reason"]) == ("CONTAINER_EXITED", 137, "Error")
    crictl.run("rm", container)
    assert container not in crictl.say("ps", "-aq").split()
    assert crictl.run("inspect", container, check=False).returncode != 0


def test_life_of_a_pod(crictl: Crictl) -> None:
    pod = crictl.say("runp", crictl.pod_file("life"))
    assert crictl.say("pods", "-q", "--name", "life") == pod
    crictl.run("stopp", pod)
    assert crictl.say("pods", "-q", "--name", "life", "--state", "NotReady") == pod
    crictl.run("rmp", pod)
    assert crictl.say("pods", "-q", "--name", "life") == ""
    assert crictl.run("inspectp", pod, check=False).returncode != 0


def test_forced_removal_of_a_ready_pod(crictl: Crictl) -> None:
    pod_file = crictl.pod_file("forced")
    pod = crictl.say("runp", pod_file)
    container = crictl.say(
        "create", pod, crictl.container_file("inside", BUSYBOX, ["sleep", "3600"]), pod_file
    )
    crictl.run("start", container)
    crictl.run("rmp", "--force", pod)
    assert container not in crictl.say("ps", "-aq").split()


def test_run_in_one_step(crictl: Crictl) -> None:
    pod_file = crictl.pod_file("one-step")
    file = crictl.container_file("one", BUSYBOX, ["sleep", "3600"])
    container = crictl.say("run", file, pod_file)
    assert container in crictl.say("ps", "-q").split()


def test_images(crictl: Crictl) -> None:
    id = crictl.say("pull", DOCKER).split()[-1]
    listed = {tag: image for image in crictl.json("images")["images"] for tag in image["repoTags"]}
    assert DOCKER in listed
    assert listed[DOCKER]["id"] in id or id in DOCKER
    status = crictl.json("inspecti", DOCKER)["status"]
    assert (status["id"], status["repoTags"]) == (listed[DOCKER]["id"], [DOCKER])
    assert int(status["size"]) > 0
    crictl.run("rmi", DOCKER)
    assert crictl.run("inspecti", DOCKER, check=False).returncode != 0


def test_image_file_system(crictl: Crictl) -> None:
    usage = crictl.json("imagefsinfo")["status"]["imageFilesystems"][0]
    assert Path(usage["fsId"]["mountpoint"]).is_dir()
    assert int(usage["usedBytes"]["value"]) > 0


def test_missing_image_is_told(crictl: Crictl) -> None:
    missing = crictl.run("pull", f"{HOST}/husk/nonesuch:1", check=False)
    assert missing.returncode != 0
    assert "nonesuch" in missing.stderr
