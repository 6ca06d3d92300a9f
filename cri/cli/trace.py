"""`husk trace POD`: the waterfall of a pod's start, as text and for programs.

The daemon keeps the phases with the pod and gives them in its verbose status, so any phase that it
comes to note is drawn here without this file knowing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from cri.cli.client import Client
from cri.proto import runtime_v1_pb2 as pb

RUNTIME_SERVICE = pb.DESCRIPTOR.services_by_name["RuntimeService"]
BARS = {"host": "█", "guest": "▒"}
WIDTH_MIN = 60
BAR_MIN = 20
TICKS = 4


class Phase(msgspec.Struct, frozen=True, rename="camel"):
    """Seconds since RunPodSandbox began; `side` is host or guest."""

    name: str
    begin_seconds: float
    end_seconds: float
    side: str = "host"

    @property
    def milliseconds(self) -> float:
        return 1000 * (self.end_seconds - self.begin_seconds)


class Start(msgspec.Struct, frozen=True, rename="camel"):
    """How a pod came to be."""

    pod_id: str
    name: str
    namespace: str
    handler: str
    accelerator: str
    phases: tuple[Phase, ...]
    source: str = ""  # where its VM came from

    @property
    def end_seconds(self) -> float:
        return max((phase.end_seconds for phase in self.phases), default=0.0)

    @property
    def title(self) -> str:
        how = ", ".join(word for word in (self.handler, self.source, self.accelerator) if word)
        return f"{self.namespace}/{self.name} ({how}), {self.pod_id[:13]}"


class _Facts(msgspec.Struct, frozen=True, rename="camel"):
    """What is read of the verbose status."""

    phases: tuple[Phase, ...] = ()
    accelerator: str = ""
    source: str = ""


class NoSuchPod(Exception):
    def __init__(self, wanted: str, found: Sequence[str]) -> None:
        text = f"{wanted!r} names {len(found)} pods: {', '.join(found)}" if found else f"no pod {wanted!r}"
        super().__init__(text)


def ask(client: Client, wanted: str) -> Start:
    """Raises CallFailed, NoSuchPod when there is none or it is not clear which one is meant."""
    pod = _find(client, wanted)
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
    answer = client.call(RUNTIME_SERVICE, "PodSandboxStatus", request)
    facts = msgspec.json.decode(answer.info["info"], type=_Facts)
    return Start(
        pod_id=pod.id,
        name=pod.metadata.name,
        namespace=pod.metadata.namespace,
        handler=pod.runtime_handler,
        accelerator=facts.accelerator,
        source=facts.source,
        phases=tuple(sorted(facts.phases, key=lambda phase: (phase.begin_seconds, -phase.end_seconds))),
    )


def _find(client: Client, wanted: str) -> pb.PodSandbox:
    """By id or its beginning, else by name; a name's newest pod that is ready goes before older ones."""
    pods = client.call(RUNTIME_SERVICE, "ListPodSandbox", pb.ListPodSandboxRequest()).items
    found = [pod for pod in pods if wanted and pod.id.startswith(wanted)]
    if not found:
        named = [pod for pod in pods if wanted in (pod.metadata.name, _full_name(pod))]
        ready = [pod for pod in named if pod.state == pb.SANDBOX_READY]
        found = ready or sorted(named, key=lambda pod: pod.created_at)[-1:]
    if len(found) != 1:
        raise NoSuchPod(wanted, [f"{_full_name(pod)} ({pod.id[:13]})" for pod in found])
    match: pb.PodSandbox = found[0]
    return match


def _full_name(pod: pb.PodSandbox) -> str:
    return f"{pod.metadata.namespace}/{pod.metadata.name}"


def as_json(start: Start) -> str:
    return msgspec.json.format(msgspec.json.encode(start), indent=2).decode()


# ------------------------------------------------------------------------------------ drawing


def as_text(start: Start, width: int) -> Iterator[str]:
    """A line for each phase, bars on one scale; `width` is the terminal's."""
    yield start.title
    if not start.phases:
        yield "nothing is known of its start"
        return
    names = max(len(phase.name) for phase in start.phases)
    room = max(max(width, WIDTH_MIN) - names - 16, BAR_MIN)
    scale_s = nice_end(start.end_seconds)
    yield f"{'':{names}}  {ruler(scale_s, room)}"
    for phase in start.phases:
        yield f"{phase.name:{names}} |{bar(phase, scale_s, room):{room}}| {milliseconds(phase)}"
    yield f"{BARS['host']} host   {BARS['guest']} guest"


def milliseconds(phase: Phase) -> str:
    value = phase.milliseconds
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def nice_end(seconds: float) -> float:
    """The end of a scale that begins at 0: a number that divides by TICKS without many digits."""
    if seconds <= 0:
        return 0.001 * TICKS
    step = seconds / TICKS
    power = 10.0 ** math.floor(math.log10(step))
    return (
        TICKS
        * power
        * next(factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * power >= step)
    )


def ticks(scale_s: float) -> list[tuple[float, str]]:
    """(place between 0 and 1, what is written there)."""
    return [(n / TICKS, f"{1000 * scale_s * n / TICKS:.4g} ms") for n in range(TICKS + 1)]


def ruler(scale_s: float, room: int) -> str:
    text = ""
    for place, label in ticks(scale_s):
        text = f"{text:{round(place * room)}}{label}"
    return text


def bar(phase: Phase, scale_s: float, room: int) -> str:
    """At least one mark, however short it was."""
    begin = min(int(room * max(phase.begin_seconds, 0.0) / scale_s), room - 1)
    end = min(max(round(room * phase.end_seconds / scale_s), begin + 1), room)
    return " " * begin + BARS.get(phase.side, BARS["host"]) * (end - begin)
