"""Records on disk survive the daemon, and a broken one harms only itself."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from network.attach import Attachment
from sandbox.records import PodRecord, PodState, VmRuntime
from sandbox.spec import PodId, PodSpec
from sandbox.store import Recorded, Store


def make_record(id: str = "aa") -> PodRecord:
    spec = PodSpec(name="web", namespace="default", uid="u1", labels={"app": "x"})
    return PodRecord(id=PodId(id), spec=spec, created_at_ns=5, runtime=VmRuntime(token=b"\x00\xff"))


def reopened(directory: Path) -> Store[PodRecord]:
    store = Store(directory, PodRecord)
    store.load()
    return store


def test_load_returns_records_as_they_were_written(tmp_path: Path) -> None:
    Store(tmp_path, PodRecord).put(make_record())
    assert list(reopened(tmp_path)) == [make_record()]


def test_drop_deletes_the_record_and_is_idempotent(tmp_path: Path) -> None:
    store = Store(tmp_path, PodRecord)
    store.put(make_record())
    store.drop("aa")
    store.drop("aa")
    assert store.get("aa") is None
    assert len(reopened(tmp_path)) == 0


BROKEN = {
    "truncated": ('{"id": 7', "truncated"),
    "empty": ("", "truncated"),
    "an array": ("[]", "object"),
    "too deep": ("[" * 100_000, "recursion|truncated|object"),
    "no utf-8": (b'{"id": "\xff"}', "Invalid UTF-8"),
    "newer": ('{"version": 99, "id": "bad"}', "version 99; this Husk reads versions 1 to 2"),
    "odd version": ('{"version": "2", "id": "bad"}', "'2' is not a version"),
    "true version": ('{"version": true, "id": "bad"}', "True is not a version"),
    "a missing field": ('{"version": 2, "id": "bad"}', "spec"),
    "a wrong type": ('{"version": 2, "id": 7}', "Expected `str`, got `int`"),
}


@pytest.mark.parametrize(("text", "reason"), BROKEN.values(), ids=BROKEN)
def test_load_with_broken_file_quarantines_it_alone(tmp_path: Path, text: str | bytes, reason: str) -> None:
    Store(tmp_path, PodRecord).put(make_record("good"))
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "bad.json").write_bytes(content)
    store = reopened(tmp_path)
    assert [record.id for record in store] == ["good"]
    assert list(store.quarantined) == ["bad"]
    assert re.search(reason, store.quarantined["bad"])
    assert (tmp_path / "bad.json").read_bytes() == content, "it stays where it is, as it is"
    store.drop("bad")
    assert not store.quarantined and not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize("key", ["state", "steps", "runtime", "network"])
def test_load_with_unknown_field_quarantines_the_record(tmp_path: Path, key: str) -> None:
    """A field whose name was damaged must not be taken for one that has its default value."""
    store = Store(tmp_path, PodRecord)
    record = make_record()
    store.put(replace(record, state=PodState.READY, steps=("vm",), network=Attachment(netns="/n")))
    path = tmp_path / "aa.json"
    path.write_text(path.read_text().replace(f'"{key}":', f'"{key[:-1]}#":'))
    assert f"{key[:-1]}#" in reopened(tmp_path).quarantined["aa"]


def test_load_with_another_id_inside_quarantines_the_record(tmp_path: Path) -> None:
    Store(tmp_path, PodRecord).put(make_record("ab"))
    (tmp_path / "ab.json").rename(tmp_path / "aa.json")
    store = reopened(tmp_path)
    assert list(store) == []
    assert store.quarantined == {"aa": "it holds the record of another id, 'ab'"}


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_load_with_unreadable_file_quarantines_it_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    Store(tmp_path, PodRecord).put(make_record())

    def fail(self: Path) -> bytes:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        store = reopened(tmp_path)
    assert store.quarantined == {"aa": f"it cannot be read: {os.strerror(code)}"}
    assert list(reopened(tmp_path)) == [make_record()], "nothing has happened to it"


def test_load_with_unlistable_directory_raises(tmp_path: Path) -> None:
    store = Store(tmp_path / "records", PodRecord)
    (tmp_path / "records").rmdir()
    with pytest.raises(FileNotFoundError):
        store.load()


def test_put_writes_the_version(tmp_path: Path) -> None:
    Store(tmp_path, PodRecord).put(make_record())
    assert '"version":2' in (tmp_path / "aa.json").read_text()


def test_load_after_interrupted_write_returns_the_old_record(tmp_path: Path) -> None:
    Store(tmp_path, PodRecord).put(make_record())
    (tmp_path / "aa.json.tmp").write_text("{half")
    assert list(reopened(tmp_path)) == [make_record()]
    assert not (tmp_path / "aa.json.tmp").exists()


def test_steps_are_saved_by_begin_and_removed_by_ended(tmp_path: Path) -> None:
    store = Store(tmp_path, PodRecord)
    thing = Recorded(make_record(), store)
    thing.begin(["network"])
    thing.begin(["network", "vm"])
    assert next(iter(reopened(tmp_path))).steps == ("network", "vm")
    thing.ended(["network", "cgroup"])
    thing.update(state=PodState.READY)
    [record] = reopened(tmp_path)
    assert (record.steps, record.state) == (("vm",), PodState.READY)
