"""A container's plan on disk: replaced as a whole, and read with an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.container import Container
from sandbox.errors import PlanUnreadable
from sandbox.plan.values import ContainerPlan, ProcessPlan
from sandbox.pod import Pod
from sandbox.records import ContainerRecord, PodRecord
from sandbox.spec import ContainerId, ContainerSpec, ImageDefaults, PodId, PodSpec
from tests.fakes.inventory import make_inventory

PLAN = ContainerPlan(id="c1", rootfs="/r", process=ProcessPlan(argv=("sh",), env=(b"RAW=\xff",)))


def container(root: Path) -> Container:
    """A container as a daemon that has just started knows it."""
    inventory = make_inventory(root)
    pod = Pod(
        PodRecord(id=PodId("p1"), spec=PodSpec(name="p", namespace="n", uid="u"), created_at_ns=0),
        inventory.pod_store,
        root / "run",
    )
    record = ContainerRecord(
        id=ContainerId("c1"),
        pod_id=pod.id,
        spec=ContainerSpec(name="c", image="i"),
        created_at_ns=0,
        image_id="sha256:1",
        image_ref="i",
        defaults=ImageDefaults(),
    )
    return Container(record, inventory.container_store, pod)


def test_saved_plan_is_read_by_the_next_daemon(tmp_path: Path) -> None:
    container(tmp_path).save_plan(PLAN)
    assert container(tmp_path).plan == PLAN


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\x0a\x02c1\xff", b'{"id": 1}', None])
def test_unreadable_plan_is_reported_with_its_file(tmp_path: Path, content: bytes | None) -> None:
    path = container(tmp_path).plan_path
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanUnreadable, match=r"c1\.plan: .*create it again"):
        _ = container(tmp_path).plan


def test_failed_save_keeps_the_previous_plan(tmp_path: Path) -> None:
    one = container(tmp_path)
    one.save_plan(PLAN)
    temporary = one.plan_path.with_name(one.plan_path.name + ".tmp")
    temporary.mkdir()
    with pytest.raises(OSError):
        one.save_plan(ContainerPlan(id="c1", rootfs="/other", process=ProcessPlan()))
    assert one.plan == container(tmp_path).plan == PLAN
    temporary.rmdir()


def test_drop_plan_is_idempotent(tmp_path: Path) -> None:
    one = container(tmp_path)
    one.save_plan(PLAN)
    one.drop_plan()
    one.drop_plan()
    assert not one.plan_path.exists()
