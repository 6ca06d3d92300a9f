"""Docker in a pod: Debian's dockerd with overlay storage builds an image, runs it, and connects it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import programs
from tests.kit.cri import Cri, Pod
from tests.kit.eventually import eventually_sync
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

DOCKER = f"{HOST}/husk/docker-inside:1"
WEB = f"{HOST}/husk/web:1"
MEMORY = 1 << 30
# As Docker's own image for this purpose begins: a cgroup with children must have no processes itself, and
# dockerd asks by this variable whether to load profiles of AppArmor.
DAEMON = """
mkdir -p /sys/fs/cgroup/init
for pid in $(cat /sys/fs/cgroup/cgroup.procs); do echo $pid >/sys/fs/cgroup/init/cgroup.procs; done
sed 's/ / +/g; s/^/+/' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
container=docker exec dockerd
"""
CONTEXT = """
set -e
mkdir -p /context && cd /context && cp /bin/busybox . && echo 'page of the inner container' >index.html
cat >Dockerfile <<END
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir /www && echo removed >/www/removed
COPY index.html /www/
RUN rm /www/removed && id -u >/www/user
CMD ["httpd", "-f", "-p", "80", "-h", "/www"]
END
"""


@pytest.fixture(scope="module")
def docker(site: Site, cri: Cri) -> Iterator[tuple[Pod, str]]:
    """Run a pod with dockerd, and wait until it answers."""
    site.registry.push("husk/docker-inside", "1", programs.docker())
    cri.pull(DOCKER)
    security = api.LinuxSandboxSecurityContext(privileged=True)
    resources = api.LinuxContainerResources(memory_limit_in_bytes=MEMORY)
    linux = api.LinuxPodSandboxConfig(
        security_context=security, cgroup_parent=cri.cgroup_parent, resources=resources
    )
    pod = cri.run_pod("docker", linux=linux)
    container = cri.run(
        pod,
        DOCKER,
        ["sh", "-c", DAEMON],
        linux=api.LinuxContainerConfig(
            security_context=api.LinuxContainerSecurityContext(privileged=True),
            resources=api.LinuxContainerResources(memory_limit_in_bytes=MEMORY),
        ),
    )
    ready = eventually_sync(
        lambda: cri.exec(container, "docker", "version"), until=lambda found: found.code == 0, timeout_s=90
    )
    assert ready.code == 0, [line.text for line in cri.log(container)]
    yield pod, container


def sh(cri: Cri, container: str, script: str) -> str:
    result = cri.exec(container, "sh", "-c", script)
    assert result.code == 0, (result, [line.text for line in cri.log(container)][-20:])
    return result.stdout


def test_docker_with_overlay_storage_builds_runs_and_connects_an_image(
    site: Site, cri: Cri, docker: tuple[Pod, str]
) -> None:
    pod, container = docker
    described = sh(cri, container, "docker info -f '{{.Driver}} {{.CgroupVersion}} {{.CgroupDriver}}'")
    assert described == "overlay2 2 cgroupfs\n"
    sh(cri, container, f"{CONTEXT}\ndocker build -q -t inner .")
    limits = "--memory 64m --pids-limit 50 --cpus 0.5"
    sh(cri, container, f"docker run -d --name web -p 8080:80 {limits} inner")
    # published by NAT: from the pod itself, and from outside of it
    assert sh(cri, container, "wget -qO- http://127.0.0.1:8080/") == "page of the inner container\n"
    fetched = site.namespace.fetch(cri.pod_ip(pod), 8080)
    assert fetched.endswith("page of the inner container\n")
    script = "cat /www/user; ls /www; cd /sys/fs/cgroup; cat memory.max pids.max"
    shown = f"docker exec web sh -c '{script}'"
    assert sh(cri, container, shown) == f"0\nindex.html\nuser\n{64 << 20}\n50\n"
    # outwards by masquerading: the other pod's network knows nothing of the inner one
    cri.pull(WEB)
    other = cri.run_pod("other")
    cri.run(other, WEB)
    address = cri.pod_ip(other)
    fetch = f"docker run --rm inner wget -qO- http://{address}/"
    assert eventually_sync(lambda: cri.exec(container, "sh", "-c", fetch).stdout, timeout_s=30) == (
        "hello from the pod\n"
    )
    sh(cri, container, "docker rm -f web && docker rmi -f inner && docker system prune -af")
