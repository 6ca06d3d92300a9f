"""An inventory over stores in a directory, for tests that need no daemon."""

from __future__ import annotations

from pathlib import Path

from sandbox.inventory import Inventory
from sandbox.records import ContainerRecord, PodRecord
from sandbox.store import Store


def make_inventory(root: Path) -> Inventory:
    """Make an inventory whose records and run directories lie below `root`."""
    return Inventory(
        Store(root / "pods", PodRecord), Store(root / "containers", ContainerRecord), root / "run"
    )
