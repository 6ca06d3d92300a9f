"""Files without a name (O_TMPFILE): where a container can have them, and the error where it cannot."""

from __future__ import annotations

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import BASELINE, Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

IMAGE = f"{HOST}/husk/unnamed:1"
SLEEP = ("sleep", "3600")


@pytest.fixture(scope="module")
def container(site: Site, cri: Cri, pod: Pod) -> str:
    layer = images.Layer().add("bin/unnamed", images.helper("unnamed"), mode=0o755)
    site.registry.push("husk/unnamed", "1", images.Image((images.base_layer(), layer)))
    cri.pull(IMAGE)
    mount = api.Mount(container_path="/volume", host_path=str(scratch_dir("unnamed")))
    return cri.run(pod, IMAGE, SLEEP, mounts=[mount])


def test_memory_of_the_guest_has_files_without_a_name(cri: Cri, container: str) -> None:
    assert cri.exec(container, "unnamed", "/dev/shm").stdout == "made\n"


@pytest.mark.parametrize("place", ["/root", "/volume"])
def test_virtio_fs_refuses_files_without_a_name(cri: Cri, container: str, place: str) -> None:
    """The limit of docs/limits.md, with the error on which programs fall back to a named file."""
    expected = "made\n" if BASELINE else "Operation not supported\n"
    assert cri.exec(container, "unnamed", place).stdout == expected
    assert cri.exec(container, "ls", "-A", place).stdout == ("named\n" if BASELINE else "")
