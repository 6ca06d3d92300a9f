"""`husk trace POD`: the waterfall of a pod's start, as text and as JSON.

The daemon keeps the phases in the pod's record and returns them in its verbose status. This file knows no
phase by name, so a new one is drawn without a change here.
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
    """A phase of the start. Times are seconds since RunPodSandbox began; `side` is "host" or "guest"."""

    name: str
    begin_seconds: float
    end_seconds: float
    side: str = "host"

    @property
    def milliseconds(self) -> float:
        """Duration."""
        return 1000 * (self.end_seconds - self.begin_seconds)


class Start(msgspec.Struct, frozen=True, rename="camel"):
    """The start of one pod: what it is, and its phases in the order in which they began."""

    pod_id: str
    name: str
    namespace: str
    handler: str
    accelerator: str
    phases: tuple[Phase, ...]
    source: str = ""  # of its VM: pool, template or boot

    @property
    def end_seconds(self) -> float:
        """End of the last phase; 0 without phases."""
        return max((phase.end_seconds for phase in self.phases), default=0.0)

    @property
    def title(self) -> str:
        """NAMESPACE/NAME (handler, source, accelerator), and the beginning of the id."""
        how = ", ".join(word for word in (self.handler, self.source, self.accelerator) if word)
        return f"{self.namespace}/{self.name} ({how}), {self.pod_id[:13]}"


class _Facts(msgspec.Struct, frozen=True, rename="camel"):
    """The part of the verbose status that is used here."""

    phases: tuple[Phase, ...] = ()
    accelerator: str = ""
    source: str = ""


class NoSuchPod(Exception):
    """No pod, or more than one, matches what the user named."""

    def __init__(self, wanted: str, found: Sequence[str]) -> None:
        text = f"{wanted!r} names {len(found)} pods: {', '.join(found)}" if found else f"no pod {wanted!r}"
        super().__init__(text)


def fetch(client: Client, wanted: str) -> Start:
    """Ask the daemon for the start of the pod with this name, id or beginning of an id.

    Raises CallFailed; NoSuchPod when no pod matches, or more than one does.
    """
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
    """Match by id or its beginning, else by name. Of several pods of one name, take the ready one, else the
    newest."""
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
    """Return the start as one JSON object, in camelCase like the CRI's."""
    return msgspec.json.format(msgspec.json.encode(start), indent=2).decode()


# ------------------------------------------------------------------------------------ drawing


def as_text(start: Start, width: int) -> Iterator[str]:
    """Yield the title, a ruler, a line with a bar for each phase, and the key. `width` is in columns."""
    yield start.title
    if not start.phases:
        yield "the daemon has no record of its start"
        return
    names = max(len(phase.name) for phase in start.phases)
    columns = max(max(width, WIDTH_MIN) - names - 16, BAR_MIN)
    scale_s = nice_end(start.end_seconds)
    yield f"{'':{names}}  {ruler(scale_s, columns)}"
    for phase in start.phases:
        yield f"{phase.name:{names}} |{bar(phase, scale_s, columns):{columns}}| {milliseconds(phase)}"
    yield f"{BARS['host']} host   {BARS['guest']} guest"


def milliseconds(phase: Phase) -> str:
    """Return the phase's duration, with one decimal below 10 ms."""
    value = phase.milliseconds
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def nice_end(seconds: float) -> float:
    """Round up to the end of a scale from 0 whose TICKS parts are round numbers."""
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
    """Return (position between 0 and 1, label) of each mark of the scale."""
    return [(n / TICKS, f"{1000 * scale_s * n / TICKS:.4g} ms") for n in range(TICKS + 1)]


def ruler(scale_s: float, columns: int) -> str:
    """Draw the labels of the scale over `columns` columns."""
    text = ""
    for place, label in ticks(scale_s):
        text = f"{text:{round(place * columns)}}{label}"
    return text


def bar(phase: Phase, scale_s: float, columns: int) -> str:
    """Draw the phase on a scale of `columns` columns; at least one mark, however short it was."""
    begin = min(int(columns * max(phase.begin_seconds, 0.0) / scale_s), columns - 1)
    end = min(max(round(columns * phase.end_seconds / scale_s), begin + 1), columns)
    return " " * begin + BARS.get(phase.side, BARS["host"]) * (end - begin)
