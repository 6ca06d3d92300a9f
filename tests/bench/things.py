"""Figures that do not depend on the source of VMs: pulls, lists, logs."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from tests.bench.figures import Figures
from tests.bench.subjects import IMAGE, SLEEP, Site, Subject, settle, settle_disk
from tests.kit import images
from tests.kit.eventually import eventually_sync
from tests.kit.images import Image, Layer
from tests.kit.registry import HOST

PAYLOAD = f"{HOST}/husk/payload:1"
LINES = f"{HOST}/husk/lines:1"
LAYER_SHARES = (0.45, 0.25, 0.15, 0.1, 0.05)  # of an image's files: a base, and what is built on it
FILES_PER_DIRECTORY = 25
LINES_PER_FILE = 100_000
LINE_BYTES = 100
LAST_LINE = b"the last line\n"

# ------------------------------------------------------------------------------------ pulls


def payload(mebibytes: int, files: int) -> Image:
    """Make an image of `files` files in several layers, most of them small, that compresses to about a third.

    Their text is made of words, so that compression has to search for repetitions as in programs and
    libraries; a tenth is random, like data that is compressed already. No two files are equal.
    """
    chance = random.Random("payload")
    words = [bytes(chance.choices(b"etaoinshrdlucmfwyp_./", k=chance.randint(2, 11))) for _ in range(4096)]
    text = b" ".join(chance.choices(words, k=600_000))
    sizes = [chance.lognormvariate(0, 1.2) for _ in range(files)]
    scale = mebibytes * (1 << 20) / sum(sizes)
    layers = [Layer() for _ in LAYER_SHARES]
    for number, size in enumerate(round(each * scale) for each in sizes):
        at = chance.randrange(len(text) // 2)
        noise = hashlib.shake_128(number.to_bytes(4, "big")).digest(size // 10)
        content = noise + (text[at:] * (1 + size // (len(text) // 2)))[: size - len(noise)]
        layer = layers[_share_of(number / files)]
        mode = 0o755 if number % 7 == 0 else 0o644
        layer.add(f"usr/lib/part{number // FILES_PER_DIRECTORY}/file{number}.dat", content, mode=mode)
    return Image(tuple(layers), cmd=("/none",))


def _share_of(place: float) -> int:
    for number, share in enumerate(LAYER_SHARES):
        place -= share
        if place < 0:
            return number
    return len(LAYER_SHARES) - 1


def pulls(site: Site, figures: Figures, rounds: int, mebibytes: int, files: int) -> None:
    site.registry.push("husk/payload", "1", payload(mebibytes, files))
    for number in range(rounds):
        # the order alternates, as the second finds the registry's files in the page cache
        for subject in site.mains if number % 2 == 0 else reversed(site.mains):
            settle_disk()
            for image, figure in ((IMAGE, "pull of a small image"), (PAYLOAD, "pull and unpack")):
                subject.cri.call("RemoveImage", image={"image": image})
                with figures.timing(figure, subject.name):
                    subject.cri.pull(image)
            with figures.timing("RemoveImage", subject.name):
                subject.cri.call("RemoveImage", image={"image": PAYLOAD})


# ------------------------------------------------------------------------------------ lists


def lists(site: Site, figures: Figures, rounds: int, containers: int) -> None:
    """Time lists over many containers of one pod. They are not started: only the daemon is measured."""
    pods = {subject: subject.cri.run_pod("lists", handler=subject.handler) for subject in site.mains}
    for subject, pod in pods.items():
        for number in range(containers):
            subject.cri.create(pod, IMAGE, SLEEP, name=f"list-{number}")
    settle()
    for _ in range(rounds):
        for subject in pods:
            with figures.timing("ListContainers, many", subject.name):
                found = subject.cri.call("ListContainers").containers
            assert len(found) == containers
            with figures.timing("ListPodSandbox, many", subject.name):
                subject.cri.call("ListPodSandbox")
    for subject, pod in pods.items():
        subject.cri.stop_pod(pod)
        subject.cri.remove_pod(pod)


# ------------------------------------------------------------------------------------- logs


def lines_image() -> Image:
    """Make an image with /lines: LINES_PER_FILE lines of LINE_BYTES bytes with the newline."""
    lines = (
        f"{number:08d} {'a line as programs write them ' * 4}"[: LINE_BYTES - 1] for number in range(1000)
    )
    block = "".join(f"{line}\n" for line in lines)
    return Image((images.base_layer(), Layer().add("lines", block * (LINES_PER_FILE // 1000))))


def logs(site: Site, figures: Figures, rounds: int, mebibytes: int) -> None:
    site.registry.push("husk/lines", "1", lines_image())
    for subject in site.mains:
        subject.cri.pull(LINES)
    for number in range(rounds):
        for subject in site.mains:
            settle_disk()
            log(subject, f"logs-{number}", mebibytes, figures)


def log(subject: Subject, name: str, mebibytes: int, figures: Figures) -> None:
    """Time from StartContainer until the last line is in the file."""
    cri = subject.cri
    repeats = max(1, round(mebibytes * (1 << 20) / (LINES_PER_FILE * LINE_BYTES)))
    script = f"i=0; while [ $i -lt {repeats} ]; do cat /lines; i=$((i+1)); done; echo {LAST_LINE.decode()}"
    pod = cri.run_pod(name, handler=subject.handler)
    container = cri.create(pod, LINES, ("sh", "-c", script), name="writer")
    path = Path(cri.status(container).log_path)
    with figures.timing("log lines", subject.name):
        cri.start(container)
        _await_last_line(path)
    written = path.read_bytes().count(b"\n")
    assert written == repeats * LINES_PER_FILE + 1, f"{subject.name} wrote {written} lines"
    # containerd 1.6 fails to stop a pod whose container exits at the same time
    cri.wait_exited(container)
    cri.stop_pod(pod)
    cri.remove_pod(pod)
    path.unlink()


def _await_last_line(path: Path, timeout_s: float = 300) -> None:
    def tail() -> bytes:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * LINE_BYTES))
            return file.read()

    eventually_sync(
        tail,
        until=lambda read: read.endswith(LAST_LINE),
        timeout_s=timeout_s,
        describe=f"the last line in {path}",
        retry_on=(FileNotFoundError,),
    )
