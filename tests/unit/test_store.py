"""Records on disk survive the daemon, and a broken one harms only itself."""

from __future__ import annotations

from pathlib import Path

from sandbox.records import PodRecord, PodState
from sandbox.spec import PodId, PodSpec
from sandbox.store import Recorded, Store


def make_record(id: str = "aa") -> PodRecord:
    spec = PodSpec(name="web", namespace="default", uid="u1", labels={"app": "x"})
    return PodRecord(id=PodId(id), spec=spec, created_at_ns=5, token=b"\x00\xff")


def reopened(directory: Path) -> Store[PodRecord]:
    store = Store(directory, PodRecord)
    store.load()
    return store


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    Store(tmp_path, PodRecord).put(make_record())
    assert list(reopened(tmp_path)) == [make_record()]


def test_a_dropped_record_is_gone_and_dropping_it_again_is_fine(tmp_path: Path) -> None:
    store = Store(tmp_path, PodRecord)
    store.put(make_record())
    store.drop("aa")
    store.drop("aa")
    assert store.get("aa") is None
    assert len(reopened(tmp_path)) == 0


def test_a_broken_file_is_set_aside_and_the_others_are_read(tmp_path: Path) -> None:
    Store(tmp_path, PodRecord).put(make_record("good"))
    (tmp_path / "bad.json").write_text('{"id": 7')
    store = reopened(tmp_path)
    assert [record.id for record in store] == ["good"]
    assert (tmp_path / "bad.json.bad").exists()


def test_a_write_cut_short_leaves_the_old_record(tmp_path: Path) -> None:
    Store(tmp_path, PodRecord).put(make_record())
    (tmp_path / "aa.json.tmp").write_text("{half")
    assert list(reopened(tmp_path)) == [make_record()]
    assert not (tmp_path / "aa.json.tmp").exists()


def test_steps_are_saved_before_and_removed_after(tmp_path: Path) -> None:
    store = Store(tmp_path, PodRecord)
    thing = Recorded(make_record(), store)
    thing.begin(["network"])
    thing.begin(["network", "vm"])
    assert next(iter(reopened(tmp_path))).steps == ("network", "vm")
    thing.ended(["network", "cgroup"])
    thing.update(state=PodState.READY)
    [record] = reopened(tmp_path)
    assert (record.steps, record.state) == (("vm",), PodState.READY)
