"""The comparison of engines, without engines: that it sees what differs, and says when it has shown nothing."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.lab import tiny_model
from engine.launcher import on_cpu
from tests.benchmarks.engine_check import __main__ as checking
from tests.benchmarks.engine_check import engines, models, without_engines
from tests.benchmarks.engine_check.answers import Answer, CheckFailed, Token, tokens_of
from tests.benchmarks.engine_check.comparison import TIE, TIE_GPU, Comparison, Tally, moved
from tests.benchmarks.engine_check.engines import OURS, STOCK
from tests.benchmarks.engine_check.equality import equality_failures
from tests.benchmarks.engine_check.requests import ADAPTED, BATCHED_TOKENS, EVERYDAY, Case, altered, crowd
from tests.benchmarks.engine_check.settings import CheckSettings, parse, settings_of
from tests.benchmarks.engine_check.throughput import spread, token_bytes, verdict

KINDS = (*EVERYDAY, "n > 1, sampled", "few tokens allowed", *ADAPTED)


def text(*ids: int, gap: float = 1.0) -> list[Token]:
    return [Token(number, -1.0, gap) for number in ids]


def tally(one: list[Token], other: list[Token], leave_after: int = 0) -> Tally:
    counted = Tally()
    counted.add(Case("plain", {}, leave_after=leave_after), Answer([one]), Answer([other]))
    return counted


# The requests


def test_a_crowd_is_the_same_each_time() -> None:
    assert crowd(3, KINDS, 4) == crowd(3, KINDS, 4)
    assert crowd(3, KINDS, 4) != crowd(4, KINDS, 4)


def test_a_crowd_has_what_it_is_asked_for() -> None:
    cases = crowd(0, KINDS, 6)
    assert {kind: sum(case.kind == kind for case in cases) for kind in KINDS} == dict.fromkeys(KINDS, 6)
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [c.body for c in cases if c.kind == kind] for kind in KINDS}
    assert all(len(body["prompt"]) > BATCHED_TOKENS for body in by_kind["chunked prefill"])
    assert len({tuple(body["prompt"][:192]) for body in by_kind["shared beginnings"]}) == 2
    assert all(body["n"] == 3 for body in by_kind["n > 1"])
    forms = [frozenset(body.get("structured_outputs", {"json": 0})) for body in by_kind["structured output"]]
    assert set(forms) == {frozenset({"json"}), frozenset({"regex"}), frozenset({"choice"})}
    assert len({body["model"] for kind in ("plain", "LoRA", "another LoRA") for body in by_kind[kind]}) == 3
    # In other orders of tags than of arrivals, or both schedulers would do the same.
    tags = [case.body["priority"] for case in cases]
    assert tags != sorted(tags)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        crowd(0, ["nonsense"], 1)


def test_altered_requests_differ_in_the_first_token_only() -> None:
    cases = crowd(0, ["plain", "chunked prefill"], 3)
    before = copy.deepcopy(cases)
    for case, other in zip(cases, altered(cases), strict=True):
        assert case.body["prompt"][0] != other.body["prompt"][0]
        assert case.body["prompt"][1:] == other.body["prompt"][1:]
        assert case.body | {"prompt": 0} == other.body | {"prompt": 0}
    assert cases == before


# The comparison


def test_equal_answers() -> None:
    found = tally(text(1, 2, 3), text(1, 2, 3))
    assert (found.tokens, found.differing, found.ties) == (3, 0, 0)


def test_one_other_token_is_seen() -> None:
    found = tally(text(1, 2, 3), text(1, 9, 3))
    assert (found.tokens, found.differing, found.ties) == (1, 1, 0)


@pytest.mark.parametrize(("one", "other"), [((1, 2), (1, 2, 3)), ((1, 2, 3), (1, 2)), ((), (1,))])
def test_another_length_is_seen(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert tally(text(*one), text(*other)).differing == 1


def test_another_number_of_choices_is_seen() -> None:
    counted = Tally()
    counted.add(Case("plain", {}), Answer([text(1), text(1)]), Answer([text(1)]))
    assert counted.differing == 1


def test_who_leaves_may_have_seen_more_of_one() -> None:
    assert tally(text(1, 2), text(1, 2, 3), leave_after=2).differing == 0
    assert tally(text(1, 2), text(1, 9, 3), leave_after=2).differing == 1


def test_a_tie_is_one_on_both_sides_or_none() -> None:
    tied = tally(text(1, 2, 3, gap=TIE / 2), text(1, 9, 9, gap=TIE / 2))
    assert (tied.tokens, tied.ties, tied.differing, tied.tokens_after_ties) == (1, 1, 0, 2)
    assert tally(text(1, 2, gap=TIE / 2), text(1, 9, gap=0.5)).differing == 1


def test_what_counts_as_a_tie_can_be_said() -> None:
    one, other = Answer([text(1, 2, gap=0.01)]), Answer([text(1, 9, gap=0.01)])
    for tie, ties in ((0.02, 1), (TIE, 0)):
        comparison = Comparison(tie)
        comparison.add([Case("plain", {})], [one], [other])
        assert (comparison.ties, comparison.differing) == (ties, 1 - ties)
        assert "tie" not in comparison.figures()["kinds"]["plain"]
    assert moved(one, other, 0.02)
    assert not moved(Answer([[Token(1, -1.0, 1.0)]]), Answer([[Token(1, -1.01, 1.0)]]), 0.02)


def test_rounding_and_the_smallest_gap_are_told() -> None:
    found = tally([Token(1, -1.0, 0.5), Token(2, -2.0, 0.01)], [Token(1, -1.0, 0.5), Token(2, -2.25, 0.01)])
    assert (found.rounding, found.smallest_gap) == (0.25, 0.01)
    assert Tally().figures()["smallest_gap"] is None


def test_what_moved_need_not_be_another_token() -> None:
    one = Answer([text(1, 2)])
    assert not moved(one, Answer([text(1, 2)]))
    assert moved(one, Answer([text(1, 9)]))
    assert moved(one, Answer([[Token(1, -1.0, 1.0), Token(2, -1.001, 1.0)]]))


def test_tokens_of_a_choice() -> None:
    best: list[dict[str, float]] = [{"token_id:5": -0.5, "token_id:6": -0.75}, {"token_id:7": 0.0}]
    choice = {"token_ids": [5, 7], "logprobs": {"token_logprobs": [-0.5, 0.0], "top_logprobs": best}}
    assert tokens_of(choice) == [Token(5, -0.5, 0.25), Token(7, 0.0, math.inf)]
    assert tokens_of({"token_ids": None, "logprobs": None}) == []
    with pytest.raises(CheckFailed, match="2 tokens"):
        tokens_of(choice | {"logprobs": {"token_logprobs": [-0.5], "top_logprobs": best}})


# What it takes to have shown something


def shown() -> dict[str, Any]:
    compared = Comparison()
    cases = [Case("plain", {}), Case("shared beginnings", {})]
    compared.add(cases, [Answer([text(1, 2)])] * 2, [Answer([text(1, 2)])] * 2)
    return {
        "justitia": compared.figures(),
        "preemptions": {STOCK: 3, OURS: 2},
        "cached_tokens": {STOCK: 64, OURS: 64},
        "accepted_tokens": {STOCK: 1, OURS: 1},
        "control_stock_again": compared.figures(),
        "control_other_prompts": {"choices": 10, "moved": 10, "differing": 9},
    }


def test_nothing_is_wrong_with_what_was_shown() -> None:
    assert equality_failures(shown()) == []


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("justitia", "differing"), 1, "differ"),
        (("justitia", "tokens"), 0, "no token was compared"),
        (("justitia", "kinds", "plain", "tokens"), 0, "of plain"),
        (("justitia", "kinds", "plain", "ties"), 2, "too many"),
        (("preemptions", OURS), 0, "preempted on justitia"),
        (("preemptions", STOCK), 0, "preempted on stock"),
        (("cached_tokens", OURS), 0, "prefix cache"),
        (("accepted_tokens", OURS), 0, "draft"),
        (("control_stock_again", "differing"), 1, "two stock engines"),
        (("control_other_prompts", "differing"), 4, "show nothing"),
        (("control_other_prompts", "moved"), 8, "show nothing"),
    ],
)
def test_a_comparison_that_shows_nothing_fails(path: tuple[str, ...], value: int, says: str) -> None:
    figures = shown()
    inner = figures
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert any(says in failure for failure in equality_failures(figures))


# Throughput


def test_the_spread_of_ratios() -> None:
    figures = spread([0.98, 1.0, 1.02, 0.99, 1.01])
    assert (figures["median"], figures["min"], figures["max"]) == (1.0, 0.98, 1.02)
    assert figures["quartile_low"] < 1.0 < figures["quartile_high"]
    assert spread([0.5])["median"] == 0.5


@pytest.mark.parametrize(("rounds", "left_out"), [(1, 0), (5, 0), (6, 0), (9, 1), (12, 2), (40, 13)])
def test_what_the_median_surely_lies_within(rounds: int, left_out: int) -> None:
    """The ranks that tables of the sign test give for 95 %."""
    figures = spread([float(number) for number in range(rounds)])
    assert (figures["sure_low"], figures["sure_high"]) == (left_out, rounds - 1 - left_out)


@pytest.mark.parametrize(
    ("low", "high", "told"), [(0.985, 1.01, "met"), (0.95, 0.97, "missed"), (0.97, 1.01, "undecided")]
)
def test_the_verdict(low: float, high: float, told: str) -> None:
    assert verdict({"sure_low": low, "sure_high": high}, 0.02) == told


# The models


@pytest.mark.vllm
def test_tensors_are_written_as_they_are_read(tmp_path: Path) -> None:
    model = tiny_model.make(tmp_path / "tiny")
    tensors = models.read_tensors(model / models.WEIGHTS)
    models.write_tensors(tmp_path / "again", tensors)
    assert models.read_tensors(tmp_path / "again") == tensors
    safetensors = pytest.importorskip("safetensors.torch")
    assert {name: list(tensor.shape) for name, tensor in safetensors.load_file(tmp_path / "again").items()} == {
        name: shape for name, (shape, _) in tensors.items()
    }


@pytest.mark.vllm
def test_only_the_layers_of_the_lively_model_are_other(tmp_path: Path) -> None:
    tiny = tiny_model.make(tmp_path / "tiny")
    lively = models.lively(tmp_path / "lively", tiny, factor=2.0)
    before = models.read_tensors(tiny / models.WEIGHTS)
    after = models.read_tensors(lively / models.WEIGHTS)
    for name, (shape, values) in before.items():
        factor = 2.0 if ".layers." in name and len(shape) == 2 else 1.0
        assert [factor * value for value in values] == list(after[name][1]), name
    assert (lively / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


@pytest.mark.vllm
def test_a_size_has_a_configuration_and_no_weights(tmp_path: Path) -> None:
    tiny = tiny_model.make(tmp_path / "tiny")
    large = models.of_size(tmp_path / "7b", tiny, models.SIZE_7B)
    config = json.loads((large / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (4096, 32, 32000)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not (large / models.WEIGHTS).exists()


@pytest.mark.vllm
def test_what_a_token_takes(tmp_path: Path) -> None:
    tiny = tiny_model.make(tmp_path / "tiny")
    large = models.of_size(tmp_path / "large", tiny, models.SIZE_7B)
    assert token_bytes(tiny) == 2 * 2 * 64 * 4  # keys and values, layers, hidden size, float32
    assert token_bytes(large) == 2 * 32 * 4096 * 2


# The setups


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> list[engines.Setup]:
    monkeypatch.setattr(engines, "on_cpu", lambda: not gpu)
    return engines.setups(Path("one"), Path("another"))


def test_a_gpu_compares_what_a_cpu_does_and_async_scheduling_once_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, (shipped, *invariant) = on_a_gpu(monkeypatch, False), on_a_gpu(monkeypatch, True)
    assert [setup.name for setup in invariant] == [setup.name for setup in on_cpu]
    assert all(setup.batch_invariant and setup.tie == TIE_GPU for setup in invariant)
    assert not any(setup.batch_invariant or setup.tie != TIE for setup in on_cpu)
    assert (shipped.args, shipped.batch_invariant, shipped.tie) == (on_cpu[0].args, False, TIE_GPU)


def test_adapters_are_compared_in_16_bits_on_a_gpu_and_with_requests_without(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = on_a_gpu(monkeypatch, False)[-1], on_a_gpu(monkeypatch, True)[-1]
    assert (cpu.name, cpu.dtype, cpu.kinds) == ("LoRA", "float32", ADAPTED)
    assert (gpu.name, gpu.dtype, gpu.kinds) == ("LoRA", "bfloat16", (*ADAPTED, "plain", "streaming"))


def test_a_variable_is_there_while_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(engines.BATCH_INVARIANT, raising=False)
    with engines.environment(engines.BATCH_INVARIANT, "1"):
        assert os.environ[engines.BATCH_INVARIANT] == "1"
    assert engines.BATCH_INVARIANT not in os.environ
    monkeypatch.setenv(engines.BATCH_INVARIANT, "0")
    with engines.environment(engines.BATCH_INVARIANT, "1"):
        pass
    assert os.environ[engines.BATCH_INVARIANT] == "0"


# The command


def test_the_gpu_check_asks_for_more_and_the_rehearsal_for_less() -> None:
    def settings(*arguments: str) -> CheckSettings:
        return settings_of(parse(arguments))

    assert settings() == CheckSettings()
    assert settings("--gpu").size == "7b"
    assert settings("--gpu", "--requests", "64").requests == 64
    assert settings("--gpu", "--requests", "128").requests == 128  # asked for, though it is the default elsewhere
    assert settings("--gpu", "--rehearse").size == "rehearsal"
    assert settings("--gpu", "--rehearse").rounds < CheckSettings().rounds
    told = settings("--gpu", "--no-tests", "--no-step-cost")
    assert not told.tests
    assert not told.step_cost
    assert settings("--only", "LoRA", "--only", "another").only == ("LoRA", "another")
    assert settings("--no-speed", "--seed", "5") == CheckSettings(speed=False, seed=5)


@pytest.mark.wire
@pytest.mark.skipif(not on_cpu(), reason="there is a GPU")
def test_the_gpu_check_is_refused_without_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.engine_check", "--gpu", "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "there is no NVIDIA GPU here" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("code", "out", "err", "told"),
    [
        (0, 'a log\n{"decoding": {"ratio": 1.01}}\n', "", {"decoding": {"ratio": 1.01}}),
        (1, "a log\n", "Traceback\nImportError: vllm\n", {"exit_code": 1, "error": "ImportError: vllm"}),
        (-9, "", "", {"exit_code": -9, "error": "no output"}),
    ],
)
def test_the_cost_of_a_step_is_its_last_line(
    code: int, out: str, err: str, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    assert without_engines.step_cost(Console(file=io.StringIO())) == told


@pytest.fixture
def first_then_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first setup and two rounds are measured; then somebody ends the run."""

    async def nothing(_: Path) -> dict[str, Path]:
        return {"adapter": Path(), "another adapter": Path()}

    async def compare(_: engines.Stage, setup: engines.Setup) -> dict[str, Any]:
        if setup.name == "lost":
            raise CheckFailed("the engine is gone\nand so on")
        return {"setup": setup.name, "failures": []}

    async def throughput(_: engines.Stage, rounds: list[dict[str, float]]) -> dict[str, Any]:
        rounds += [{STOCK: 100.0, OURS: 99.0}, {STOCK: 100.0, OURS: 101.0}]
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(checking, "make_all", nothing)
    monkeypatch.setattr(checking, "setups", lambda *_: [engines.Setup(name, (), ()) for name in ("kept", "lost")])
    monkeypatch.setattr(checking, "compare", compare)
    monkeypatch.setattr(checking, "throughput", throughput)
    monkeypatch.setattr(checking, "equality_table", str)


@pytest.mark.wire
@pytest.mark.usefixtures("first_then_ended")
def test_what_was_found_is_told_when_the_run_is_ended() -> None:
    console = Console(file=io.StringIO())
    record = asyncio.run(checking.check(CheckSettings(), console, gpu=False, rehearsal=False))
    assert [figures["setup"] for figures in record["equality"]] == ["kept"]
    assert record["not_exercised"]["lost"] == "the engine is gone"
    assert record["throughput"]["ratio"]["median"] == 1.0
    assert not record["passed"]
    assert record["failures"][-1] == "the run was ended from outside, before its end"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.wire
@pytest.mark.usefixtures("first_then_ended")
def test_setups_can_be_chosen_by_name() -> None:
    settings = CheckSettings(only=("kept", "none such"), speed=False)
    record = asyncio.run(checking.check(settings, Console(file=io.StringIO()), gpu=False, rehearsal=False))
    assert [figures["setup"] for figures in record["equality"]] == ["kept"]
    assert record["failures"] == ["there is no setup of this name: none such"]


def test_the_plugin_is_found_while_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    with engines.async_on_cpu(tmp_path):
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "before"]
        (found,) = metadata.Distribution.discover(path=[str(tmp_path)])
        (entry,) = found.entry_points
        assert (entry.group, entry.value) == ("vllm.general_plugins", f"{engines.PLUGIN_NAME}:register")
        compile((tmp_path / f"{engines.PLUGIN_NAME}.py").read_text(), "plugin", "exec")
    assert os.environ["PYTHONPATH"] == "before"
