"""The phases of a guest's boot on the host's clock, also of a guest that reports nonsense."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.guest import guest_pb2 as pb
from sandbox.records import Phase, Side
from sandbox.vm_pods.boot_phases import GUEST_PHASES_MAX, guest_phases

BEGAN_S = 1000.0


def phases_of(*moments: tuple[str, int], now_ms: int = 900, received_s: float = 2.0) -> Sequence[Phase]:
    """The phases by a Welcome that was received so many seconds after RunPodSandbox began."""
    phases = [pb.BootPhase(name=name, at_ns=at_ms * 1_000_000) for name, at_ms in moments]
    welcome = pb.Welcome(phases=phases, now_ns=now_ms * 1_000_000)
    return tuple(
        guest_phases(welcome, received_s=BEGAN_S + received_s, began_s=BEGAN_S, vmm_started_s=BEGAN_S + 0.5)
    )


def rounded(phases: Sequence[Phase]) -> list[tuple[str, float, float]]:
    return [(phase.name, round(phase.begin_s, 3), round(phase.end_s, 3)) for phase in phases]


def test_moments_become_phases_after_the_firmware() -> None:
    phases = phases_of(("agent", 600), ("mounts", 700), ("channel", 800))
    assert rounded(phases) == [
        ("firmware", 0.5, 1.1),
        ("kernel", 1.1, 1.7),
        ("mounts", 1.7, 1.8),
        ("channel", 1.8, 1.9),
    ]
    assert {phase.side for phase in phases} == {Side.GUEST}


def test_boot_before_run_pod_sandbox_has_no_phases() -> None:
    assert phases_of(("agent", 600), now_ms=5000) == ()


def test_agent_without_a_clock_has_no_phases() -> None:
    assert phases_of(("agent", 600), now_ms=0) == ()


def test_malformed_or_unordered_moments_end_the_phases() -> None:
    assert [phase.name for phase in phases_of(("agent", 600), ("mounts", 500))] == ["firmware", "kernel"]
    assert [phase.name for phase in phases_of(("agent", 600), ("later", 901))] == ["firmware", "kernel"]
    for name in ("", "A", "x" * 25, "a b", "a\n", "<script>"):
        assert [phase.name for phase in phases_of(("agent", 600), (name, 700))] == ["firmware", "kernel"]


def test_number_of_phases_is_bounded() -> None:
    assert len(phases_of(*[("a", n) for n in range(500)])) == GUEST_PHASES_MAX + 1
