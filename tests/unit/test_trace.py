"""`husk trace`: selection of the pod, and drawing of its start."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import msgspec
import pytest

from cri.cli import trace, trace_page
from cri.cli.client import Client
from cri.cli.trace import NoSuchPod, Phase, Start
from cri.proto import runtime_v1_pb2 as pb

PHASES = (
    Phase(name="queue", begin_seconds=0.0, end_seconds=0.0001),
    Phase(name="network", begin_seconds=0.0, end_seconds=0.06),
    Phase(name="kernel", begin_seconds=0.1, end_seconds=0.4, side="guest"),
)
START = Start(
    pod_id="f" * 64,
    name="web",
    namespace="shop",
    handler="pool",
    accelerator="tcg",
    phases=PHASES,
)


def pod(id: str, name: str, *, ready: bool = True, created_at: int = 0) -> pb.PodSandbox:
    state = pb.SANDBOX_READY if ready else pb.SANDBOX_NOTREADY
    metadata = pb.PodSandboxMetadata(name=name, namespace="shop")
    return pb.PodSandbox(id=id, metadata=metadata, state=state, created_at=created_at, runtime_handler="pool")


class FakeClient:
    """A daemon with these pods; remembers whose status was requested."""

    def __init__(self, *pods: pb.PodSandbox) -> None:
        self.pods = pods
        self.requested = ""

    def call(self, service: object, method: str, request: Any) -> Any:
        if method == "ListPodSandbox":
            return pb.ListPodSandboxResponse(items=self.pods)
        self.requested = request.pod_sandbox_id
        facts = {"phases": msgspec.to_builtins(PHASES[::-1]), "accelerator": "tcg", "more": [1]}
        return pb.PodSandboxStatusResponse(info={"info": json.dumps(facts)})


def fetch(client: FakeClient, wanted: str) -> Start:
    return trace.fetch(cast(Client, client), wanted)


def test_pod_is_found_by_id_prefix_or_name() -> None:
    client = FakeClient(pod("abc1", "web"), pod("abd2", "db"))
    for wanted, id in (("abc", "abc1"), ("db", "abd2"), ("shop/web", "abc1")):
        assert fetch(client, wanted).pod_id == id
        assert client.requested == id


def test_phases_are_sorted_by_begin() -> None:
    start = fetch(FakeClient(pod("abc1", "web")), "web")
    assert [phase.name for phase in start.phases] == ["network", "queue", "kernel"]
    assert start.end_seconds == 0.4


def test_name_shared_by_several_pods_means_the_ready_one_else_the_newest() -> None:
    old = pod("a1", "web", ready=False, created_at=1)
    new = pod("a2", "web", ready=False, created_at=2)
    assert fetch(FakeClient(new, old), "web").pod_id == "a2"
    assert fetch(FakeClient(old, pod("a3", "web"), new), "web").pod_id == "a3"


@pytest.mark.parametrize("wanted", ["", "nothing", "a"])
def test_name_without_match_or_with_several_is_refused(wanted: str) -> None:
    with pytest.raises(NoSuchPod, match="names 2 pods: shop/web" if wanted == "a" else "no pod"):
        fetch(FakeClient(pod("a1", "web"), pod("a2", "db")), wanted)


def test_text_draws_all_bars_on_one_scale() -> None:
    title, ruler, *bars, key = trace.as_text(START, width=63)
    assert title == "shop/web (pool, tcg), fffffffffffff"
    assert ruler.split() == ["0", "ms", "100", "ms", "200", "ms", "300", "ms", "400", "ms"]
    inside = [line.split("|")[1] for line in bars]
    assert [len(each) for each in inside] == [40, 40, 40]
    assert inside[0].rstrip() == "█"  # shorter than one column, and still drawn
    assert inside[1].rstrip() == "█" * 6
    assert inside[2] == " " * 10 + "▒" * 30
    assert [line.rpartition("| ")[2] for line in bars] == ["0.1 ms", "60 ms", "300 ms"]
    assert "host" in key and "guest" in key


def test_text_with_narrow_terminal_or_without_phases_is_complete() -> None:
    assert len(list(trace.as_text(START, width=0))) == 6
    assert (
        "no record of its start"
        in list(trace.as_text(msgspec.structs.replace(START, phases=()), width=80))[1]
    )


@pytest.mark.parametrize(("seconds", "end"), [(0.0, 0.004), (0.4, 0.4), (0.41, 0.6), (1.93, 2.0), (61, 80)])
def test_scale_ends_at_round_number(seconds: float, end: float) -> None:
    assert trace.nice_end(seconds) == pytest.approx(end)


def test_json_has_every_phase() -> None:
    document = json.loads(trace.as_json(START))
    assert document["podId"] == START.pod_id
    assert document["phases"][2] == {
        "name": "kernel",
        "beginSeconds": 0.1,
        "endSeconds": 0.4,
        "side": "guest",
    }


def test_html_page_is_self_contained_and_escapes_names() -> None:
    hostile = Phase(name="<b>&", begin_seconds=-1.0, end_seconds=0.2)
    page = trace_page.as_html(msgspec.structs.replace(START, name="<i>", phases=(*PHASES, hostile)))
    assert "<b>" not in page and "<i>," not in page and "&lt;b&gt;&amp;" in page
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script", page)
    assert page.count('<div class="track">') == 4
    assert 'class="guest" style="left:25.000%;width:75.000%"' in page
