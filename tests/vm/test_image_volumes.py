"""VOLUMEs of an image under a read-only root: nested, behind a link, missing in the image, mounted over."""

from __future__ import annotations

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

IMAGE = f"{HOST}/husk/volumes:1"
SLEEP = ("sleep", "3600")
USER, GROUP = 1000, 2000


def image() -> images.Image:
    layer = images.Layer()
    for folder in ("outer", "outer/plain", "outer/plain/inner", "real", "real/data"):
        layer.directory(folder, mode=0o750, uid=USER, gid=GROUP)
        layer.add(f"{folder}/file", f"of {folder}\n", uid=USER, gid=GROUP)
    layer.directory("outer/hidden", uid=USER, gid=GROUP).add("outer/hidden/file", "of hidden\n")
    layer.symlink("linked", "real")
    volumes = ("/outer", "/outer/plain/inner/", "/outer/hidden", "/linked/data", "/missing/here")
    return images.Image((images.base_layer(), layer), volumes=volumes)


@pytest.fixture(scope="module", params=[False, True], ids=["VM", "host pod"])
def container(site: Site, cri: Cri, pod: Pod, request: pytest.FixtureRequest) -> str:
    """Run a container whose root is read-only, as the user that owns the VOLUMEs, with a volume over one."""
    site.registry.push("husk/volumes", "1", image())
    cri.pull(IMAGE)
    namespaces = api.NamespaceOption(network=api.NODE if request.param else api.POD)
    if request.param:
        context = api.LinuxSandboxSecurityContext(namespace_options=namespaces)
        sandbox = api.LinuxPodSandboxConfig(security_context=context, cgroup_parent=cri.cgroup_parent)
        pod = cri.run_pod("image-volumes-host", linux=sandbox, hostname="")
    security = api.LinuxContainerSecurityContext(
        readonly_rootfs=True,
        run_as_user=api.Int64Value(value=USER),
        run_as_group=api.Int64Value(value=GROUP),
        namespace_options=namespaces,
    )
    over = scratch_dir("over")
    over.chmod(0o777)
    mount = api.Mount(container_path="/outer/hidden", host_path=str(over))
    linux = api.LinuxContainerConfig(security_context=security)
    return cri.run(pod, IMAGE, SLEEP, linux=linux, mounts=[mount])


def test_nested_and_linked_volumes_have_the_images_files_and_owners(cri: Cri, container: str) -> None:
    for path, name in {
        "/outer": "outer",
        "/outer/plain": "outer/plain",
        "/outer/plain/inner": "outer/plain/inner",
        "/linked/data": "real/data",
    }.items():
        assert cri.exec(container, "cat", f"{path}/file").stdout == f"of {name}\n"
        assert cri.exec(container, "stat", "-c", "%a %u:%g", path).stdout == f"750 {USER}:{GROUP}\n"
        assert cri.exec(container, "sh", "-c", f"echo new >{path}/new && cat {path}/new").stdout == "new\n"
    assert cri.exec(container, "cat", "/real/data/new").stdout == "new\n"


def test_rest_of_the_root_is_read_only(cri: Cri, container: str) -> None:
    for path in ("/real/new", "/tmp/new"):
        assert "Read-only file system" in cri.exec(container, "touch", path).stderr


def test_mount_over_a_volume_hides_it(cri: Cri, container: str) -> None:
    assert cri.exec(container, "ls", "-A", "/outer/hidden").stdout == ""
    assert cri.exec(container, "touch", "/outer/hidden/new").code == 0


def test_volume_that_the_image_lacks_is_an_empty_directory_of_root(cri: Cri, container: str) -> None:
    assert cri.exec(container, "ls", "-A", "/missing/here").stdout == ""
    assert cri.exec(container, "stat", "-c", "%u:%g", "/missing/here").stdout == "0:0\n"
    assert "Permission denied" in cri.exec(container, "touch", "/missing/here/new").stderr
