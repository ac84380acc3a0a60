from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import DONE, UsageFilter
from tests.wire.scripted_engine import chunk, usage_chunk

STREAM = chunk("a\\n\\n") + chunk('"usage":{ in the text') + chunk("ü") + usage_chunk(5, 3, cached=2) + DONE


@given(st.lists(st.integers(0, len(STREAM)), max_size=20), st.booleans())
def test_however_it_is_cut_the_same_comes_out(cuts: list[int], show: bool) -> None:
    events = UsageFilter(show=show)
    places = [0, *sorted(cuts), len(STREAM)]
    out = b"".join(events.feed(STREAM[begin:end]) for begin, end in itertools.pairwise(places))
    assert out == (STREAM if show else STREAM.replace(usage_chunk(5, 3, cached=2), b""))
    assert events.usage is not None
    assert (events.usage.prompt_tokens, events.usage.completion_tokens, events.usage.cached_tokens) == (5, 3, 2)
    assert events.events == 5
    assert events.done


def test_usage_beside_choices_is_seen_and_stays() -> None:
    """`continuous_usage_stats`: the client asked for it in every chunk."""
    event = b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    events = UsageFilter(show=False)
    assert events.feed(event) == event
    assert events.usage is not None
    assert not events.done
