"""What containers do with files, in a root filesystem and on a volume, and containers with many mounts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cri.proto import runtime_v1_pb2 as api
from tests.bench.figures import Figures
from tests.bench.subjects import IMAGE, SLEEP, Site, Subject, settle, settle_disk
from tests.kit import images
from tests.kit.cri import Pod
from tests.kit.debian import libraries_of
from tests.kit.images import Image, Layer
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

TOOLS = f"{HOST}/husk/tools:1"
GIT = Path("/usr/bin/git")
FILES_PER_DIRECTORY = 50
MOUNTS = 30
PLACES = {"rootfs": "/own", "volume": "/data"}
WORK_S = 900  # what one of the calls may take without KVM


def archive(files: int) -> bytes:
    """Return a tar of a git repository with one commit of `files` files of up to 5 KiB."""
    top = scratch_dir("repository")
    for number in range(files):
        file = top / f"tree/part{number // FILES_PER_DIRECTORY}/file{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number}\n" * (1 + number % 1000))
    author = ["-c", "user.name=bench", "-c", "user.email=bench", "-c", "gc.auto=0"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "all"], ["gc", "-q"]):
        subprocess.run([str(GIT), *command], cwd=top / "tree", check=True)
    made = subprocess.run(["tar", "-c", "-C", str(top), "tree"], check=True, capture_output=True).stdout
    shutil.rmtree(top)
    return made


def tools(files: int) -> Image:
    """Make an image with git, the helper `disk`, and a repository in an archive."""
    layer = Layer().add("usr/bin/git", GIT.read_bytes(), mode=0o755)
    for path, library in libraries_of(GIT).items():
        layer.add(path.lstrip("/"), library.read_bytes(), mode=0o755)
    layer.add("bin/disk", images.helper("disk"), mode=0o755).add("tree.tar", archive(files))
    return Image((images.base_layer(), layer))


def files(site: Site, figures: Figures, rounds: int, count: int, synced: int, mebibytes: int) -> None:
    site.registry.push("husk/tools", "1", tools(count))
    for subject in site.mains:
        subject.cri.pull(TOOLS)
    for number in range(rounds):
        for subject in site.mains:
            settle_disk()
            work(subject, f"files-{number}", figures, synced, mebibytes)


def work(subject: Subject, name: str, figures: Figures, synced: int, mebibytes: int) -> None:
    """Do everything once in each place, in one container."""
    cri = subject.cri
    cri.timeout_s = WORK_S
    pod = cri.run_pod(name, handler=subject.handler)
    volume = api.Mount(container_path="/data", host_path=str(scratch_dir("files")))
    container = cri.run(pod, TOOLS, SLEEP, mounts=[volume])

    def run(*command: str, figure: str = "") -> None:
        with (figures if figure else Figures()).timing(figure, subject.name):
            answer = cri.exec(container, *command)
        assert answer.code == 0, f"{subject.name}: {command}: {answer.stderr[-500:]}"

    for place, path in PLACES.items():
        run("mkdir", "-p", path)
        run("tar", "-x", "-f", "/tree.tar", "-C", path, figure=f"untar, {place}")
        status = ("git", "-C", f"{path}/tree", "status")
        run(*status, figure=f"git status, {place}, which reads all")  # times in the index are of other files
        run(*status, figure=f"git status, {place}")
        run("disk", "synced", f"{path}/synced", str(synced), figure=f"4 KiB synced writes, {place}")
        run("disk", "write", f"{path}/stream", str(mebibytes), figure=f"sequential write, {place}")
        run("disk", "read", f"{path}/stream", str(mebibytes), figure=f"sequential read, {place}")
    cri.stop_pod(pod)
    cri.remove_pod(pod)


def mounts(site: Site, figures: Figures, rounds: int) -> None:
    """Time the life of a container with MOUNTS volumes, which no other container of its pod has."""
    folders = [scratch_dir("mount") for _ in range(MOUNTS)]
    volumes = [
        api.Mount(container_path=f"/volumes/{number}", host_path=str(folder), readonly=number % 2 == 0)
        for number, folder in enumerate(folders)
    ]
    pods = {subject: subject.cri.run_pod("mounts", handler=subject.handler) for subject in site.mains}
    for number in range(rounds + 1):
        for subject, pod in pods.items():
            settle()
            # the cost of the first container is not counted
            mounted(subject, pod, f"mounts-{number}", volumes, figures if number else Figures())
    for subject, pod in pods.items():
        subject.cri.stop_pod(pod)
        subject.cri.remove_pod(pod)


def mounted(subject: Subject, pod: Pod, name: str, volumes: Sequence[api.Mount], figures: Figures) -> None:
    cri = subject.cri
    with figures.timing("Create+Start, 30 mounts", subject.name):
        with figures.timing("CreateContainer, 30 mounts", subject.name):
            container = cri.create(pod, IMAGE, SLEEP, name=name, mounts=volumes)
        with figures.timing("StartContainer, 30 mounts", subject.name):
            cri.start(container)
    cri.stop(container, timeout=0)
    with figures.timing("RemoveContainer, 30 mounts", subject.name):
        cri.remove(container)
