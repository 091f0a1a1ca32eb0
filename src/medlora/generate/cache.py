"""Keys and values of everything read so far, in blocks of 64 tokens that conversations may share.

Each layer holds two pools [blocks, 64, K, C]; a conversation is a list of blocks in any order (Kwon et al. 2023,
PagedAttention, arXiv:2309.06180). The pools begin small and double, up to a share of the memory that was free. A
block whose 64 tokens are known is found again by what it holds: its own tokens, the block before it and the adapter
that computed it. So a prefix that many prompts share is computed once, and the next turn of a chat computes only what
is new. Blocks that nobody holds stay findable until they are needed, the longest unused first.

Block 0 belongs to nobody: rows that only fill up a batch write there.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 64
FIRST = 16  # blocks to begin with

Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class Held:
    """Blocks of one conversation."""

    slot: int
    """The adapter, -1 for none: other adapters, other keys and values."""
    blocks: list[int] = field(default_factory=list)
    known: int = 0
    """Leading tokens that the cache held already."""


class Cache:
    """Pools for `layers` layers of K heads of size C.

    Args:
        limit: bytes that the pools may take.
    """

    def __init__(
        self, layers: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device, limit: int
    ) -> None:
        block = 2 * layers * BLOCK * heads[0] * heads[1] * dtype.itemsize
        self.limit = max(limit // block, 2)
        shape = (min(FIRST, self.limit), BLOCK, *heads)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.grown = 0
        """How often the pools moved."""
        self.users = [0] * shape[0]
        self.free = list(range(shape[0] - 1, 0, -1))
        self.found: dict[Key, int] = {}
        self.keys: dict[int, Key] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Blocks without a user that can still be found, the longest unused first."""

    def take(self, ids: Sequence[int], tokens: int, slot: int) -> Held | None:
        """Blocks for `tokens` tokens, of which `ids` are the first; None if there are not enough now.

        At least the last of `ids` is left to compute. The blocks that `ids` fill can be found at once, so fill them in
        the next pass.
        """
        held, parent = Held(slot), _root(slot)
        for start in range(0, (len(ids) - 1) // BLOCK * BLOCK, BLOCK):
            block = self.found.get((parent, tuple(ids[start : start + BLOCK])))
            if block is None:
                break
            held.blocks.append(block)
            self._use(block)
            parent = block
        held.known = len(held.blocks) * BLOCK
        missing = -(-tokens // BLOCK) - len(held.blocks)
        if not self._make_room(missing):
            self.give(held, ids[: held.known])
            return None
        for block in sorted(self._fresh() for _ in range(missing)):  # neighbours in order are read without a copy
            held.blocks.append(block)
            self._use(block)
        self.remember(held, ids)
        return held

    def remember(self, held: Held, ids: Sequence[int]) -> None:
        """Make the whole blocks of `ids` findable, up to one whose like is findable already."""
        parent = _root(held.slot)
        for block, start in zip(held.blocks, range(0, len(ids) - BLOCK + 1, BLOCK), strict=False):
            if block not in self.keys:
                key = parent, tuple(ids[start : start + BLOCK])
                if key in self.found:
                    return  # what follows would hang on a block that may hold something else tomorrow
                self.found[key], self.keys[block] = block, key
            parent = block

    def give(self, held: Held, ids: Sequence[int]) -> None:
        """Give back blocks that now hold `ids`; the last first, so that a prefix outlives what follows it."""
        self.remember(held, ids)
        for block in reversed(held.blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                if block in self.keys:
                    self.idle[block] = None
                else:
                    self.free.append(block)

    def forget(self) -> None:
        """Nothing is findable any more: the weights changed, or a pass broke off."""
        self.free += self.idle
        self.idle.clear()
        self.found.clear()
        self.keys.clear()

    def possible(self, tokens: int) -> bool:
        """Whether an empty cache would hold `tokens` tokens."""
        return -(-tokens // BLOCK) < self.limit

    def _use(self, block: int) -> None:
        self.users[block] += 1
        self.idle.pop(block, None)

    def _fresh(self) -> int:
        if not self.free:
            block, _ = self.idle.popitem(last=False)
            del self.found[self.keys.pop(block)]
            return block
        return self.free.pop()

    def _make_room(self, missing: int) -> bool:
        """Grow where the free and idle blocks do not suffice. False at the limit."""
        blocks = len(self.users)
        short = missing - len(self.free) - len(self.idle)
        if short <= 0:
            return True
        if blocks + short > self.limit:
            return False
        more = min(max(short, blocks), self.limit - blocks)
        for pools in (self.k, self.v):
            for i, pool in enumerate(pools):  # one at a time: the old one is freed before the next is made
                pools[i] = torch.cat([pool, pool.new_zeros(more, *pool.shape[1:])])
        self.grown += 1
        self.users += [0] * more
        self.free = list(range(blocks + more - 1, blocks - 1, -1)) + self.free
        return True

    def rows(self, layer: int, blocks: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, K, C] of the first `tokens` tokens; a view where the blocks are neighbours."""
        needed = blocks[: -(-tokens // BLOCK)]
        first, last = needed[0], needed[-1]
        if last - first == len(needed) - 1 and list(needed) == list(range(first, last + 1)):
            k, v = (pool[layer][first : last + 1] for pool in (self.k, self.v))
        else:
            index = torch.tensor(needed, device=self.k[layer].device)
            k, v = (pool[layer].index_select(0, index) for pool in (self.k, self.v))
        return k.flatten(0, 1)[:tokens], v.flatten(0, 1)[:tokens]


def _root(slot: int) -> int:
    """What stands before a first block: no block's number, another for each adapter."""
    return -2 - slot
