"""What tasks really hold: KV tokens, summed over the iterations, with a block that several hold counted once.

A request holds its computed tokens in each iteration. A block that it shares with k - 1 others, since they begin alike, counts
1/k for each of them, so that the costs of all add up to the memory that was taken. The prompt's formula (`predictor.cost`)
knows nothing of chunks, preemption, or what was shared when.

A request that decodes gains a token in each iteration, so what it has held since it was last looked at follows from what it
holds now. Only a step that does something else looks at each. Sharing costs something only where it begins or ends: a
shared block has an account of what each of its holders has saved so far, Σ (1 - 1/k), and a request is credited with the
difference between its end and its beginning. Imports no vLLM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.scheduler.order import hints_of

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

Request = Any  # vLLM's, with fields of ours: `justitia_held`, `justitia_counted`


class _Sharing:
    """How many requests hold a block, and what each has saved until the iteration `since`."""

    __slots__ = ("holders", "saved", "since")

    def __init__(self, holders: int, since: int) -> None:
        self.holders, self.since, self.saved = holders, since, 0.0

    def settle(self, iteration: int, holders: int) -> float:
        """Sets how many hold it from now on. Returns what each of them has saved until now, in iterations."""
        self.saved += (iteration - self.since) * (1 - 1 / self.holders)
        self.since, self.holders = iteration, holders
        return self.saved


class Ledger:
    """The account of KV token·iterations held by each request."""

    def __init__(self, block_size: int, blocks_of: Callable[[Request], Sequence[KVCacheBlock]]) -> None:
        """`blocks_of`: a request's blocks in the order of its tokens; those of one kind of attention stand for all."""
        self.iteration = 0
        self._block_size = block_size
        self._blocks_of = blocks_of
        self._shared: dict[int, _Sharing] = {}  # by block; those that more than one holds or has held

    def open(self, request: Request) -> None:
        request.justitia_held = 0
        request.justitia_counted = self.iteration  # up to which `justitia_held` goes

    def admit(self, request: Request, cached_tokens: int) -> None:
        """The request was admitted, or again after a preemption; so many of its tokens were in the cache already."""
        request.justitia_counted = self.iteration
        for block in self._blocks_of(request)[: cached_tokens // self._block_size]:
            sharing = self._shared.get(block.block_id)
            if sharing is not None:
                request.justitia_held += sharing.settle(self.iteration, block.ref_cnt) * self._block_size
            elif block.ref_cnt > 1 and not block.is_null:  # which stands for what is out of a window
                self._shared[block.block_id] = _Sharing(block.ref_cnt, self.iteration)

    def steady_step(self) -> None:
        """Counts an iteration in which every running request has computed one token."""
        self.iteration += 1

    def step(self, running: Iterable[Request], computed: Mapping[str, int]) -> None:
        """Counts an iteration. computed: its tokens, by request id."""
        self.iteration += 1
        for request in running:
            tokens = request.num_computed_tokens
            before = self.iteration - 1 - request.justitia_counted
            if before:
                request.justitia_held += _decoded(before, tokens - computed.get(request.request_id, 0))
            request.justitia_held += tokens
            request.justitia_counted = self.iteration

    def leave(self, request: Request) -> float:
        """The request is about to give up its blocks, for good or by preemption. Returns what it has held so far, in
        token·iterations."""
        request.justitia_held += self._decoded_since(request)
        request.justitia_counted = self.iteration
        if self._shared:
            for block in self._blocks_of(request):
                sharing = self._shared.get(block.block_id)
                if sharing is None:
                    continue
                left = block.ref_cnt - 1
                request.justitia_held -= sharing.settle(self.iteration, max(1, left)) * self._block_size
                if left < 1:
                    del self._shared[block.block_id]
        return max(0.0, float(request.justitia_held))

    def _decoded_since(self, request: Request) -> int:
        if not request.num_computed_tokens:
            return 0  # it waits
        return _decoded(self.iteration - request.justitia_counted, request.num_computed_tokens)

    def by_agent(self, running: Iterable[Request]) -> dict[str, float]:
        """KV tokens that each agent holds now, by its id."""
        held: dict[str, float] = defaultdict(float)
        for request in running:
            tokens = float(request.num_computed_tokens)
            if self._shared:
                holders = (self._shared.get(block.block_id) for block in self._blocks_of(request))
                tokens -= self._block_size * sum(1 - 1 / sharing.holders for sharing in holders if sharing is not None)
            held[hints_of(request).agent] += tokens
        return dict(held)


def _decoded(iterations: int, tokens: int) -> int:
    """Token·iterations held over so many iterations, with one token more in each, and `tokens` in the last."""
    return iterations * tokens - iterations * (iterations - 1) // 2
