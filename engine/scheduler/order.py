"""The order of requests in the scheduler, waiting and running. Imports no vLLM."""

from __future__ import annotations

from typing import Any

from engine.hints import Hints, from_fields

Request = Any  # vLLM's, with a field of ours: `justitia_hints`

# (hints, arrival time in seconds, request id): the smallest is scheduled first.
Place = tuple[Hints, float, str]


def hints_of(request: Request) -> Hints:
    """The request's hints, read once and then kept on the request, so that they live as long as it does.

    They are an attribute like vLLM's own. `vars(request)` would give the request a dictionary, and every attribute that vLLM
    then reads of it, some dozens in each step, would take longer (CPython 3.11 to 3.13).
    """
    hints: Hints | None = getattr(request, "justitia_hints", None)
    if hints is None:
        params = request.sampling_params  # a pooling request has none
        hints = request.justitia_hints = from_fields(request.priority, params.extra_args if params else None)
    return hints


def retag(request: Request, tag: int) -> None:
    """Gives the request another tag. A queue that holds it must then place it anew."""
    request.justitia_hints = hints_of(request)._replace(tag=tag)
    request.priority = tag


def place_of(request: Request) -> Place:
    """The place of a request that waits."""
    return hints_of(request), request.arrival_time, request.request_id


def victims_last(request: Request) -> tuple[int, str, int, int, float, str]:
    """The place of a request that runs: the largest is the next victim.

    That is a task of the agent with the largest tag; of its tasks the one with the fewest computed tokens; of equals the
    one that came last.
    """
    hints = hints_of(request)
    return hints.tag, hints.agent, -request.num_computed_tokens, hints.task, request.arrival_time, request.request_id
