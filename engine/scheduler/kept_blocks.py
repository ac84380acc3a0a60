"""The free blocks, of which some are kept for agents that wait for their tools.

vLLM's free blocks remember what was computed in them until another request takes them, the least recently freed first. Here
they are in two parts: first all others, in vLLM's order, then the kept ones, by agent: the one with the largest tag is
the first to lose its own, and of them the end before the beginning. So nothing is withheld: a kept block is as free as any
other, every admission finds it, and no request waits for it. It is only taken last.

A keeping ends by itself when its time is over, when the agent comes back, or when it is let go.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from engine.hints import Hints


class _Keeping:
    """The blocks that are kept for one agent, until an iteration."""

    __slots__ = ("agent", "blocks", "tag", "until")

    def __init__(self, agent: str, tag: int, until: int) -> None:
        self.agent, self.tag, self.until = agent, tag, until
        self.blocks: dict[int, KVCacheBlock] = {}  # by id, the first to be taken first

    def __lt__(self, other: _Keeping) -> bool:
        return (-self.tag, self.agent) < (-other.tag, other.agent)


class KeptBlocks(FreeKVCacheBlockQueue):  # type: ignore[misc, unused-ignore]  # Any, where mypy skips vLLM
    """Takes the place of a pool's queue, with the blocks that are free in it now."""

    def __init__(self, blocks: list[KVCacheBlock]) -> None:
        super().__init__(blocks)
        self._keepings: list[_Keeping] = []  # none is empty; the first to be taken first
        self._keeping_of: dict[int, _Keeping] = {}  # by block
        self.next_end = 0  # the first iteration in which a keeping may be over; 0 for none

    @property
    def num_kept_blocks(self) -> int:
        return len(self._keeping_of)

    def keep(self, agent: str, tag: int, blocks: Sequence[KVCacheBlock], until: int) -> None:
        """Keeps these free blocks, the first to be taken first, and what is kept for the agent already, until an iteration."""
        keeping = _Keeping(agent, tag, until)
        for block in (*self._take(agent), *blocks):
            # One that is kept for another agent too stays there.
            if block.block_id not in self._keeping_of and block.block_id not in keeping.blocks:
                self._unlink(block)
                keeping.blocks[block.block_id] = block
        if not keeping.blocks:
            return
        insort(self._keepings, keeping)
        place = self._keepings.index(keeping) + 1
        after = self._first_of(self._keepings[place]) if place < len(self._keepings) else self.fake_free_list_tail
        self._insert(keeping.blocks.values(), after)
        self._keeping_of |= dict.fromkeys(keeping.blocks, keeping)
        self.next_end = min(self.next_end or until, until)

    def let_go(self, agent: str) -> None:
        """Makes what is kept for the agent as free as any other block, and the last of them to be taken."""
        self._free_again(self._take(agent))

    def end_keepings(self, iteration: int) -> None:
        """Ends those whose time is over."""
        for agent in [one.agent for one in self._keepings if one.until <= iteration]:
            self.let_go(agent)
        self.next_end = min((one.until for one in self._keepings), default=0)

    # vLLM's own

    def popleft(self) -> KVCacheBlock:
        block = super().popleft()
        self._forget(block)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().popleft_n(n)
        if self._keeping_of:
            for block in blocks:
                self._forget(block)
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        super().remove(block)
        self._forget(block)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        if self._keepings:
            self._insert(blocks, self._first_of(self._keepings[0]))
        else:
            super().append_n(blocks)

    def _take(self, agent: str) -> list[KVCacheBlock]:
        """What was kept for the agent. It no longer is, and still stands where it stood in the list."""
        for keeping in self._keepings:
            if keeping.agent == agent:
                self._keepings.remove(keeping)
                for block_id in keeping.blocks:
                    del self._keeping_of[block_id]
                return list(keeping.blocks.values())
        return []

    def _free_again(self, blocks: list[KVCacheBlock]) -> None:
        for block in blocks:
            self._unlink(block)
        self.append_n(blocks)

    def _forget(self, block: KVCacheBlock) -> None:
        keeping = self._keeping_of.pop(block.block_id, None)
        if keeping is not None:
            del keeping.blocks[block.block_id]
            if not keeping.blocks:
                self._keepings.remove(keeping)

    def _unlink(self, block: KVCacheBlock) -> None:
        super().remove(block)

    def _first_of(self, keeping: _Keeping) -> KVCacheBlock:
        return next(iter(keeping.blocks.values()))

    def _insert(self, blocks: Iterable[KVCacheBlock], after: KVCacheBlock) -> None:
        """Inserts blocks before the block `after`, which is in the list."""
        last = after.prev_free_block
        assert last is not None  # at least the list's own head
        for block in blocks:
            last.next_free_block, block.prev_free_block = block, last
            last = block
            self.num_free_blocks += 1
        last.next_free_block, after.prev_free_block = after, last


class Computed(NamedTuple):
    """What an agent's next task may begin with."""

    tag: int  # of its last task
    blocks: list[KVCacheBlock]  # that are free and hold it still, the first to be taken first


class LastBlocks:
    """Remembers which blocks each agent's last tasks have computed, of as many blocks as the pool has."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._of: dict[str, tuple[int, dict[int, Any]]] = {}  # by agent: its tag, and hashes by block
        self._remembered = 0  # blocks in them

    def remember(self, hints: Hints, groups: Iterable[Sequence[KVCacheBlock]]) -> None:
        """A task of the agent gives up its blocks, which are those of each group in the order of its tokens."""
        hashes = self.forget(hints.agent)
        pool = self._pool.blocks
        for group in groups:
            for block in reversed(group):
                # Not those of another pool.
                if block.block_hash is not None and block.block_id < len(pool) and pool[block.block_id] is block:
                    hashes.pop(block.block_id, None)  # what several of its tasks have is taken last
                    hashes[block.block_id] = block.block_hash
        self._of[hints.agent] = hints.tag, hashes
        self._remembered += len(hashes)
        while self._remembered > self._pool.num_gpu_blocks and len(self._of) > 1:
            self.forget(next(iter(self._of)))

    def forget(self, agent: str) -> dict[int, Any]:
        """Returns what was remembered, the hash by block."""
        _, hashes = self._of.pop(agent, (0, {}))
        self._remembered -= len(hashes)
        return hashes

    def free(self, agent: str) -> Computed | None:
        """None for an agent of which nothing is remembered. Blocks that were taken or computed anew since are left out."""
        if agent not in self._of:
            return None
        tag, hashes = self._of[agent]
        pool = self._pool.blocks
        free = [pool[i] for i, block_hash in hashes.items() if not pool[i].ref_cnt and pool[i].block_hash == block_hash]
        return Computed(tag, free)
