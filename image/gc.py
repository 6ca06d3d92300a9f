"""What may go: layers that no image names and no container uses.

`in_use` is asked anew each time, and a layer that a pull is just taking up is pinned, so a removal
beside a pull or a CreateContainer never takes away what those are about to mount. A layer below a
used one is used too: both lists hold whole chains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from image.index import Index
from image.layers import LayerStore


def find_unused(index: Index, layers: LayerStore, in_use: Collection[str]) -> frozenset[str]:
    named = {chain_id for image in index.list() for chain_id in image.chain_ids}
    return frozenset(layers.chain_ids()) - named - frozenset(in_use)


class Collector:
    def __init__(self, index: Index, layers: LayerStore, in_use: Callable[[], Collection[str]]) -> None:
        self._index = index
        self._layers = layers
        self._in_use = in_use
        self._emptying = asyncio.Lock()

    async def collect(self) -> None:
        """Remove what is unused. Its space is free again when this returns."""
        self._layers.remove(find_unused(self._index, self._layers, self._in_use()))
        await self.empty_trash()

    async def empty_trash(self) -> None:
        async with self._emptying:
            await asyncio.to_thread(self._layers.empty_trash)
