"""`husk trace`: which pod is meant, and what is drawn of its start."""

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
    def __init__(self, *pods: pb.PodSandbox) -> None:
        self.pods = pods
        self.asked = ""

    def call(self, service: object, method: str, request: Any) -> Any:
        if method == "ListPodSandbox":
            return pb.ListPodSandboxResponse(items=self.pods)
        self.asked = request.pod_sandbox_id
        facts = {"phases": msgspec.to_builtins(PHASES[::-1]), "accelerator": "tcg", "more": [1]}
        return pb.PodSandboxStatusResponse(info={"info": json.dumps(facts)})


def asked(client: FakeClient, wanted: str) -> Start:
    return trace.ask(cast(Client, client), wanted)


def test_a_pod_is_found_by_the_beginning_of_its_id_or_by_its_name() -> None:
    client = FakeClient(pod("abc1", "web"), pod("abd2", "db"))
    for wanted, id in (("abc", "abc1"), ("db", "abd2"), ("shop/web", "abc1")):
        assert asked(client, wanted).pod_id == id
        assert client.asked == id


def test_phases_come_in_the_order_in_which_they_began() -> None:
    start = asked(FakeClient(pod("abc1", "web")), "web")
    assert [phase.name for phase in start.phases] == ["network", "queue", "kernel"]
    assert start.end_seconds == 0.4


def test_of_one_name_the_pod_that_is_ready_is_meant_else_the_newest() -> None:
    old = pod("a1", "web", ready=False, created_at=1)
    new = pod("a2", "web", ready=False, created_at=2)
    assert asked(FakeClient(new, old), "web").pod_id == "a2"
    assert asked(FakeClient(old, pod("a3", "web"), new), "web").pod_id == "a3"


@pytest.mark.parametrize("wanted", ["", "nothing", "a"])
def test_no_pod_and_several_are_told(wanted: str) -> None:
    with pytest.raises(NoSuchPod, match="names 2 pods: shop/web" if wanted == "a" else "no pod"):
        asked(FakeClient(pod("a1", "web"), pod("a2", "db")), wanted)


def test_bars_lie_on_one_scale() -> None:
    title, ruler, *bars, key = trace.as_text(START, width=63)
    assert title == "shop/web (pool, tcg), fffffffffffff"
    assert ruler.split() == ["0", "ms", "100", "ms", "200", "ms", "300", "ms", "400", "ms"]
    inside = [line.split("|")[1] for line in bars]
    assert [len(each) for each in inside] == [40, 40, 40]
    assert inside[0].rstrip() == "█"  # too short to be seen, and shown all the same
    assert inside[1].rstrip() == "█" * 6
    assert inside[2] == " " * 10 + "▒" * 30
    assert [line.rpartition("| ")[2] for line in bars] == ["0.1 ms", "60 ms", "300 ms"]
    assert "host" in key and "guest" in key


def test_a_narrow_terminal_and_no_phases_do_no_harm() -> None:
    assert len(list(trace.as_text(START, width=0))) == 6
    assert "nothing is known" in list(trace.as_text(msgspec.structs.replace(START, phases=()), width=80))[1]


@pytest.mark.parametrize(("seconds", "end"), [(0.0, 0.004), (0.4, 0.4), (0.41, 0.6), (1.93, 2.0), (61, 80)])
def test_a_scale_ends_at_a_round_number(seconds: float, end: float) -> None:
    assert trace.nice_end(seconds) == pytest.approx(end)


def test_json_gives_all_there_is() -> None:
    told = json.loads(trace.as_json(START))
    assert told["podId"] == START.pod_id
    assert told["phases"][2] == {"name": "kernel", "beginSeconds": 0.1, "endSeconds": 0.4, "side": "guest"}


def test_the_page_is_one_file_and_escapes_names() -> None:
    hostile = Phase(name="<b>&", begin_seconds=-1.0, end_seconds=0.2)
    page = trace_page.as_html(msgspec.structs.replace(START, name="<i>", phases=(*PHASES, hostile)))
    assert "<b>" not in page and "<i>," not in page and "&lt;b&gt;&amp;" in page
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script", page)
    assert page.count('<div class="track">') == 4
    assert 'class="guest" style="left:25.000%;width:75.000%"' in page
