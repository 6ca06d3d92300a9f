"""What pulls and imports are doing at this moment, for those who did not begin them.

The kubelet's pulls have no terminal: `husk image ls --pulling` shows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from image.blobs import Progress

Report = Callable[[Progress], None]


class Transfer:
    """A pull or import under way: its name, when it began, and how far each of its layers is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began_s = time.monotonic()
        self._layers: dict[str, Progress] = {}

    def count(self, progress: Progress) -> None:
        """Take a report."""
        self._layers[progress.item] = progress

    @property
    def layers(self) -> int:
        """How many layers there are; 0 while that is not known."""
        return len(self._layers)

    @property
    def stored(self) -> int:
        """How many of them are unpacked, or were there before."""
        return sum(each.step != "download" and each.current == each.total for each in self._layers.values())

    @property
    def bytes_total(self) -> int:
        """The bytes of all layers, compressed, without those that were there before."""
        return sum(each.total for each in self._layers.values() if each.step != "present")

    @property
    def bytes_received(self) -> int:
        """How many of these have been received."""
        return sum(
            each.current if each.step == "download" else each.total
            for each in self._layers.values()
            if each.step != "present"
        )


class Transfers:
    """The pulls and imports of one store that are under way."""

    def __init__(self) -> None:
        self._running: list[Transfer] = []

    def list(self) -> Sequence[Transfer]:
        """Return them, the oldest first."""
        return tuple(self._running)

    @contextmanager
    def follow(self, name: str, report: Report) -> Iterator[Report]:
        """List one during the block; yields what is to be given its reports, which passes them on."""
        transfer = Transfer(name)

        def both(progress: Progress) -> None:
            transfer.count(progress)
            report(progress)

        self._running.append(transfer)
        try:
            yield both
        finally:
            self._running.remove(transfer)
