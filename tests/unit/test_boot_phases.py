"""The guest's phases on the host's clock, also those of a guest that lies."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.guest import guest_pb2 as pb
from sandbox.records import Phase, Side
from sandbox.vm_pods.boot_phases import GUEST_PHASES_MAX, guest_phases

BEGAN_S = 1000.0


def told(*moments: tuple[str, int], now_ms: int = 900, received_s: float = 2.0) -> Sequence[Phase]:
    """What comes of a Welcome that was received so long after the pod was asked for."""
    phases = [pb.BootPhase(name=name, at_ns=at_ms * 1_000_000) for name, at_ms in moments]
    welcome = pb.Welcome(phases=phases, now_ns=now_ms * 1_000_000)
    return tuple(
        guest_phases(welcome, received_s=BEGAN_S + received_s, began_s=BEGAN_S, vmm_started_s=BEGAN_S + 0.5)
    )


def rounded(phases: Sequence[Phase]) -> list[tuple[str, float, float]]:
    return [(phase.name, round(phase.begin_s, 3), round(phase.end_s, 3)) for phase in phases]


def test_moments_become_stretches_behind_the_firmware() -> None:
    phases = told(("agent", 600), ("mounts", 700), ("channel", 800))
    assert rounded(phases) == [
        ("firmware", 0.5, 1.1),
        ("kernel", 1.1, 1.7),
        ("mounts", 1.7, 1.8),
        ("channel", 1.8, 1.9),
    ]
    assert {phase.side for phase in phases} == {Side.GUEST}


def test_a_boot_before_the_pod_was_asked_for_is_not_of_its_start() -> None:
    assert told(("agent", 600), now_ms=5000) == ()


def test_an_agent_that_tells_no_clock_tells_nothing() -> None:
    assert told(("agent", 600), now_ms=0) == ()


def test_what_a_guest_makes_up_is_dropped() -> None:
    assert [phase.name for phase in told(("agent", 600), ("mounts", 500))] == ["firmware", "kernel"]
    assert [phase.name for phase in told(("agent", 600), ("later", 901))] == ["firmware", "kernel"]
    for name in ("", "A", "x" * 25, "a b", "a\n", "<script>"):
        assert [phase.name for phase in told(("agent", 600), (name, 700))] == ["firmware", "kernel"]


def test_their_number_is_bounded() -> None:
    assert len(told(*[("a", n) for n in range(500)])) == GUEST_PHASES_MAX + 1
