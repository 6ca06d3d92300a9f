"""Garbage collection of layers: remove those that no image names and no container uses.

`in_use` is read at each collection, and a layer that a pull or a root filesystem is about to use is pinned,
so a collection that runs at the same time as a pull or CreateContainer never removes what they mount next. A
layer below a used one is used too: images and containers name whole chains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from image.index import Index
from image.layers import LayerStore


def find_unused(index: Index, layers: LayerStore, in_use: Collection[str]) -> frozenset[str]:
    """Return the chain ids of all layers that neither an image nor `in_use` names."""
    named = {chain_id for image in index.list() for chain_id in image.chain_ids}
    return frozenset(layers.chain_ids()) - named - frozenset(in_use)


class Collector:
    """Collects layers of one store. `in_use` returns the chain ids below all containers, or None while these
    are not known."""

    def __init__(
        self, index: Index, layers: LayerStore, in_use: Callable[[], Collection[str] | None]
    ) -> None:
        self._index = index
        self._layers = layers
        self._in_use = in_use
        self._emptying = asyncio.Lock()

    async def collect(self) -> None:
        """Remove what is unused, nothing while it is not known what is used. Its space is free when this
        returns."""
        in_use = self._in_use()
        if in_use is not None:
            self._layers.remove(find_unused(self._index, self._layers, in_use))
        await self.empty_trash()

    async def empty_trash(self) -> None:
        """Delete what was removed. Waits for another call that is deleting already."""
        async with self._emptying:
            await asyncio.to_thread(self._layers.empty_trash)
