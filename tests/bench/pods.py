"""The calls of a pod's life one by one, and many pods at once."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.figures import Figures
from tests.bench.subjects import IMAGE, SLEEP, Site, Subject, settle

EXECS = 5


def lifecycles(site: Site, figures: Figures, rounds: int) -> None:
    for subject in site.subjects:
        lifecycle(subject, 0, Figures())  # the cost of the first pod is not counted
    for number in range(1, rounds + 1):
        for subject in site.subjects:
            settle()
            lifecycle(subject, number, figures)


def lifecycle(subject: Subject, number: int, figures: Figures) -> None:
    """Run and remove one pod, timing each call."""
    cri, name = subject.cri, subject.name
    with figures.timing("RunPodSandbox", name):
        pod = cri.run_pod(f"bench-{subject.handler or 'runc'}-{number}", handler=subject.handler)
    with figures.timing("CreateContainer+StartContainer", name):
        with figures.timing("CreateContainer", name):
            container = cri.create(pod, IMAGE, SLEEP, name="main")
        with figures.timing("StartContainer", name):
            cri.start(container)
    for each in range(EXECS):
        # the first exec in a container reads its program from the image
        with figures.timing("ExecSync" if each else "ExecSync, first", name):
            assert cri.exec(container, "true").code == 0
    with figures.timing("ContainerStatus", name):
        cri.status(container)
    with figures.timing("StopContainer", name):
        cri.stop(container, timeout=0)
    with figures.timing("RemoveContainer", name):
        cri.remove(container)
    with figures.timing("StopPodSandbox", name):
        cri.stop_pod(pod)
    with figures.timing("RemovePodSandbox", name):
        cri.remove_pod(pod)


def crowds(site: Site, figures: Figures, rounds: int, size: int) -> None:
    """Request `size` pods at once and time until the last one is ready."""
    for number in range(rounds):
        for subject in site.mains:
            settle()
            crowd(subject, f"crowd-{number}", size, figures)


def crowd(subject: Subject, name: str, size: int, figures: Figures) -> None:
    cri = subject.cri
    configs = [cri.pod_config(f"{name}-{each}") for each in range(size)]
    try:
        with figures.timing("pods at once", subject.name):
            asked = [cri.begin("RunPodSandbox", config=c, runtime_handler=subject.handler) for c in configs]
            for each in asked:
                each.result()
    finally:
        pods = [pod.id for pod in cri.call("ListPodSandbox").items if pod.metadata.name.startswith(name)]
        all_of(subject, "StopPodSandbox", pods)
        all_of(subject, "RemovePodSandbox", pods)


def all_of(subject: Subject, call: str, pods: Sequence[str]) -> None:
    for each in [subject.cri.begin(call, pod_sandbox_id=pod) for pod in pods]:
        each.result()
