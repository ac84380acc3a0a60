"""The engine with our scheduler puts out the tokens that vLLM's own scheduler does, whatever it has to do for them.

Two engines of their own, with a model in which every earlier token counts: beside a stock one (the session's engine
repeats its last token, and would do so with any cache). Both have a step in flight while the next one is scheduled, and
a small part of the memory that is asked for.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmarks.engine_check import models
from tests.benchmarks.engine_check.engines import BLOCK_SIZE_CPU, OURS, STOCK, Setup, Stage
from tests.benchmarks.engine_check.equality import compare
from tests.benchmarks.engine_check.requests import CROWDED, CROWDED_BLOCKS, EVERYDAY
from tests.benchmarks.engine_check.settings import CheckSettings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

# The second alone fills the memory: all of its sequences begin in the same few steps, and grow beyond it together.
QUIET = ("n > 1, sampled", CROWDED)


@pytest.fixture(scope="module")
def figures(session_dir: Path, tiny_model_dir: Path) -> dict[str, Any]:
    """What the comparison found."""
    directory = session_dir / "equality"
    made = {"lively": models.lively(directory / "lively", tiny_model_dir)}
    setup = Setup("tests", ("--async-scheduling",), EVERYDAY, QUIET, overlapped=True)
    settings = CheckSettings(waves=1, crowd=4, control=False, kv_tokens=CROWDED_BLOCKS * BLOCK_SIZE_CPU)
    stage = Stage(settings, directory, made, Console(file=io.StringIO()))
    return asyncio.run(compare(stage, setup))


@pytest.mark.parametrize("kind", [*EVERYDAY, *QUIET])
def test_every_token_is_the_same(figures: dict[str, Any], kind: str) -> None:
    tally = figures["justitia"]["kinds"][kind]
    assert tally["requests"] == 4
    assert tally["tokens"] > 0
    assert tally["differing"] == 0
    assert tally["ties"] <= 1


def test_tasks_were_preempted_on_both(figures: dict[str, Any]) -> None:
    assert figures["preemptions"][OURS] > 0
    assert figures["preemptions"][STOCK] > 0


def test_beginnings_came_from_the_prefix_cache_on_both(figures: dict[str, Any]) -> None:
    assert figures["cached_tokens"][OURS] > 0
    assert figures["cached_tokens"][STOCK] > 0


def test_other_prompts_give_other_tokens(figures: dict[str, Any]) -> None:
    """The control: with the first token of each prompt changed the comparison fails."""
    control = figures["control_other_prompts"]
    assert control["choices"] >= 8
    assert control["differing"] >= 0.5 * control["choices"]
    assert control["moved"] == control["choices"]


def test_the_command_would_pass(figures: dict[str, Any]) -> None:
    assert figures["failures"] == []
