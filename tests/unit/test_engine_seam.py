"""The protocols between pods and what runs them stay narrow."""

from __future__ import annotations

import inspect

import pytest

from sandbox.engine import ContainerRuntime, Control, PodRuntime, Sessions
from sandbox.lifecycle import Step, Subject
from sandbox.pod import PodLink

PROTOCOLS: list[tuple[type[object], int]] = [
    (PodRuntime, 5),
    (ContainerRuntime, 5),
    (Sessions, 5),
    (Control, 5),
    (Subject, 4),
    (Step, 2),
    (PodLink, 2),
]


@pytest.mark.parametrize(("protocol", "most"), PROTOCOLS)
def test_protocol_has_few_methods_each_with_a_docstring(protocol: type[object], most: int) -> None:
    found = [name for name, _ in inspect.getmembers(protocol, inspect.isfunction) if not name.startswith("_")]
    assert 0 < len(found) <= most
    assert [name for name in found if not inspect.getdoc(getattr(protocol, name))] == []
