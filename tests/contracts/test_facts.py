"""Each of the facts about vLLM's own code that our scheduler rests on holds in the releases that it names, and in no other.

`make contracts` runs this on several releases, `make test` on the installed one.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from engine import compat
from engine.launcher import EngineSpec


@pytest.fixture(scope="module")
def release() -> compat.Release:
    found = compat.distribution()
    assert found is not None
    release = compat.release_of(found[1])
    assert release is not None
    return release


def test_the_release_is_the_one_that_was_meant() -> None:
    found = compat.distribution()
    assert found is not None
    assert found[1] == os.environ.get("JUSTITIA_CONTRACT", found[1])
    import vllm

    assert vllm.__version__.partition("+")[0] == found[1].partition("+")[0]


def test_all_is_well() -> None:
    assert compat.check() == []


@pytest.mark.parametrize("fact", compat.FACTS, ids=str)
def test_a_fact_holds_where_it_says(fact: compat.Fact, release: compat.Release) -> None:
    complaint = compat.complaint_about(fact)
    if compat.holds_in(fact, release):
        assert complaint is None
    else:
        assert complaint is not None


def test_no_fact_is_beyond_what_is_supported() -> None:
    for fact in compat.FACTS:
        assert compat.LOWEST <= fact.since < fact.before <= compat.BEYOND


def test_the_policy_is_read_where_we_know_it(release: compat.Release) -> None:
    """`self.policy` after `__init__`: the choice of the victim, and until 0.30 that of the queue, which we override."""
    readers = set()
    for module in ("scheduler", "async_scheduler"):
        tree = ast.parse(inspect.getsource(importlib.import_module(f"vllm.v1.core.sched.{module}")))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and "self.policy" in map(ast.unparse, ast.walk(function)):
                readers.add(function.name)
    assert readers == {"__init__", "schedule"} | (
        {"_select_waiting_queue_for_scheduling"} if release < (0, 31) else set()
    )


def test_every_flag_of_the_launcher_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"kv_blocks": 128, "block_size": 32, "max_num_seqs": 8, "max_model_len": 512}
    spec = EngineSpec("a-model", tmp_path, **sizes, kv_cache_gib=1.0, forced_lengths=tmp_path / "t")
    for cpu in (True, False):
        monkeypatch.setattr("engine.launcher.on_cpu", lambda cpu=cpu: cpu)
        flags = {word for word in spec.command() if word.startswith("--")}
        assert flags >= {"--scheduler-cls", "--additional-config", "--uds"}
        assert flags - set(server_parser()._option_string_actions) == set()


def test_every_variable_of_the_launcher_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs

    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)  # set for all of this machine's engines; a user may well do so
    ours = EngineSpec("a-model", tmp_path, forced_lengths=tmp_path / "t").environment()
    names = {name for name in ours if name.startswith("VLLM_")}
    assert names >= {"VLLM_NO_USAGE_STATS", "VLLM_USE_V2_MODEL_RUNNER"}
    assert names - vllm.envs.environment_variables.keys() == set()


def server_parser() -> Any:
    """The parser of vLLM's own server, which has moved twice."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for place in ("openai", "launchers", "common"):
        try:
            module = importlib.import_module(f"vllm.entrypoints.{place}.cli_args")
        except ModuleNotFoundError:
            continue
        return module.make_arg_parser(FlexibleArgumentParser())
    raise AssertionError("the server's arguments are not to be found")
