"""Images pulled from a real registry: forms, names, digests, removal, and their use by a pod."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit import images
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import Daemon
from tests.kit.registry import HOST

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"


def status_of(cri: Cri, image: str) -> api.Image:
    status: api.Image = cri.call("ImageStatus", image=api.ImageSpec(image=image)).image
    return status


def remove(cri: Cri, image: str) -> None:
    cri.call("RemoveImage", image=api.ImageSpec(image=image))


@pytest.mark.parametrize("repository", ["husk/docker", "husk/index"])
def test_image_of_each_format_runs(cri: Cri, repository: str) -> None:
    name = f"{HOST}/{repository}:1"
    id = cri.pull(name)
    found = status_of(cri, name)
    assert (found.id, list(found.repo_tags)) == (id, [name])
    assert found.size > 0
    assert [each.split("@")[0] for each in found.repo_digests] == [f"{HOST}/{repository}"]
    for reference in (id, found.repo_digests[0]):
        assert status_of(cri, reference).id == id
    remove(cri, name)
    assert not status_of(cri, name).id
    remove(cri, name)


@pytest.mark.parametrize("packing", list(images.Packing))
def test_image_of_each_compression_runs(cri: Cri, pod: Pod, site: Site, packing: images.Packing) -> None:
    word = packing.name.lower()
    layer = images.Layer(packing=packing).add("etc/packing", word)
    image = images.Image((images.base_layer(), layer))
    site.registry.push(f"husk/packing-{word}", "1", image)
    name = f"{HOST}/husk/packing-{word}:1"
    assert cri.pull(name) == image.id
    assert cri.run_to_end(pod, name, ["cat", "/etc/packing"]) == (0, f"{word}\n")
    remove(cri, name)


def test_pull_by_digest_has_no_tag(cri: Cri, site: Site) -> None:
    digest = site.registry.push("husk/by-digest", "1", images.busybox("by digest"))
    name = f"{HOST}/husk/by-digest@{digest}"
    cri.pull(name)
    found = status_of(cri, name)
    assert (list(found.repo_tags), list(found.repo_digests)) == ([], [name])
    remove(cri, name)


def test_image_under_several_tags_is_one_image(cri: Cri, site: Site) -> None:
    image = images.busybox("several tags")
    names = [f"{HOST}/husk/several:{tag}" for tag in ("a", "b")]
    for name in names:
        site.registry.push("husk/several", name.rpartition(":")[2], image)
    assert {cri.pull(name) for name in names} == {image.id}
    assert sorted(status_of(cri, image.id).repo_tags) == names
    remove(cri, names[0])
    assert not status_of(cri, names[1]).id


def test_concurrent_pulls_give_one_image(cri: Cri, site: Site) -> None:
    image = images.busybox("at once")
    site.registry.push("husk/at-once", "1", image)
    name = f"{HOST}/husk/at-once:1"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(cri.pull, [name] * 4)) == {image.id}
        list(pool.map(lambda each: remove(cri, each), [name] * 4))
    assert not status_of(cri, name).id


def test_image_status_reports_the_user(cri: Cri, site: Site) -> None:
    wanted = {"1002": (1002, ""), "www-data": (None, "www-data"), "1003:1003": (1003, "")}
    for number, (user, (uid, username)) in enumerate(wanted.items()):
        site.registry.push("husk/user", str(number), images.busybox(f"user {user}", user=user))
        name = f"{HOST}/husk/user:{number}"
        cri.pull(name)
        found = status_of(cri, name)
        assert (found.uid.value if found.HasField("uid") else None, found.username) == (uid, username)
        remove(cri, name)


def test_pod_keeps_running_after_its_image_is_removed(cri: Cri, pod: Pod, site: Site) -> None:
    site.registry.push("husk/removed", "1", images.busybox("removed"))
    name = f"{HOST}/husk/removed:1"
    cri.pull(name)
    container = cri.run(pod, name, ["sleep", "3600"])
    remove(cri, name)
    assert not status_of(cri, name).id
    assert cri.exec(container, "cat", "/etc/image-mark").stdout == "removed\n"
    assert cri.status(container).image_ref


def test_image_fs_info_reports_usage(cri: Cri) -> None:
    usage = cri.call("ImageFsInfo").image_filesystems[0]
    assert usage.timestamp > 0
    assert usage.used_bytes.value > 0
    assert usage.inodes_used.value > 0
    assert Path(usage.fs_id.mountpoint).is_dir()


@pytest.mark.parametrize("form", ["oci", "docker"])
def test_husk_image_import_imports_an_archive(
    daemon: Daemon, cri: Cri, pod: Pod, tmp_path: Path, form: str
) -> None:
    archive, name = tmp_path / "image.tar", f"example.test/imported:{form}"
    write = images.write_oci_layout if form == "oci" else images.write_docker_archive
    write(archive, {name: images.busybox(f"imported {form}")})
    command = daemon.command("image", "import", str(archive))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert cri.run_to_end(pod, name, ["cat", "/etc/image-mark"]) == (0, f"imported {form}\n")
    remove(cri, name)
