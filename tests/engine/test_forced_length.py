"""Forced lengths without an engine: the table, and the rows of vLLM's batch as they come, move and go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from engine.lab.forced_length import KEY_XARG, TABLE_ENVIRONMENT, ForcedLength, LengthTable

pytestmark = pytest.mark.vllm

VOCABULARY, END, OTHER_END = 16, 0, 3


def write(path: Path, lengths: Any) -> Path:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(lengths))
    new.replace(path)
    return path


def params(key: str | None, **more: Any) -> SamplingParams:
    made = SamplingParams(extra_args=None if key is None else {KEY_XARG: key}, stop_token_ids=[OTHER_END], **more)
    made.update_from_generation_config({}, eos_token_id=END)
    return made


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "lengths.json", {"three": 3, "one": 1})


@pytest.fixture
def processor(table: Path) -> ForcedLength:
    config: Any = SimpleNamespace(additional_config={"justitia": {"forced_lengths": str(table)}})
    return ForcedLength(config, torch.device("cpu"), False)


def apply(processor: ForcedLength, rows: int) -> list[str]:
    """For each row: what may come next."""
    logits = processor.apply(torch.ones(rows, VOCABULARY))
    words = []
    for row in logits.tolist():
        allowed = {token for token in range(VOCABULARY) if row[token] != float("-inf")}
        if allowed == {END}:
            words.append("end")
        elif allowed == set(range(VOCABULARY)) - {END, OTHER_END}:
            words.append("go on")
        else:
            assert allowed == set(range(VOCABULARY))
            words.append("free")
    return words


def test_it_ends_at_its_length_and_not_before(processor: ForcedLength) -> None:
    three: list[int] = []
    one: list[int] = []
    free: list[int] = []
    processor.update_state(
        BatchUpdate(
            3, [], [(0, params("three"), [], three), (1, params("one"), [], one), (2, params(None), [], free)], []
        )
    )
    assert apply(processor, 3) == ["go on", "end", "free"]
    # Async scheduling: the token of the last step is not known yet, and holds its place with -1.
    three.append(-1)
    assert apply(processor, 3)[0] == "go on"
    three[:] = [5, -1]
    assert apply(processor, 3)[0] == "end"
    # One step more may be on its way when the end is seen.
    three.append(-1)
    assert apply(processor, 3)[0] == "end"


def test_a_resumed_request_goes_on_counting(processor: ForcedLength) -> None:
    processor.update_state(BatchUpdate(1, [], [(0, params("three"), [], [5, 5])], []))
    assert apply(processor, 1) == ["end"]


def test_rows_move_and_go(processor: ForcedLength) -> None:
    added: list[Any] = [(0, params("three"), [], []), (1, params(None), [], []), (2, params("one"), [], [])]
    processor.update_state(BatchUpdate(3, [], added, []))
    processor.update_state(BatchUpdate(3, [], [], [(0, 2, MoveDirectionality.SWAP)]))
    assert apply(processor, 3) == ["end", "free", "go on"]
    processor.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert apply(processor, 2) == ["go on", "free"]
    processor.update_state(BatchUpdate(1, [0], [(0, params(None), [], [])], []))
    assert apply(processor, 1) == ["free"]
    processor.update_state(None)


def test_it_changes_what_is_most_likely(processor: ForcedLength) -> None:
    assert not processor.is_argmax_invariant()


def test_what_slipped_through_admission_is_not_forced(processor: ForcedLength, table: Path) -> None:
    """An error here would stop the engine for everybody."""
    odd: list[Any] = [(0, params("unknown"), [], []), (1, SamplingParams(extra_args={KEY_XARG: "three"}), [], [])]
    processor.update_state(BatchUpdate(2, [], odd, []))
    assert apply(processor, 2) == ["free", "free"]
    table.write_text("{")
    processor.update_state(BatchUpdate(2, [], [(0, params("new"), [], [])], []))
    assert apply(processor, 2) == ["free", "free"]


def test_admission(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ForcedLength.validate_params(params("unknown"))  # no table is named: nothing is known
    monkeypatch.setenv(TABLE_ENVIRONMENT, str(table))
    ForcedLength.validate_params(params("three"))
    ForcedLength.validate_params(params(None))
    with pytest.raises(ValueError, match="no forced length is known for forced_length_key 'new'"):
        ForcedLength.validate_params(params("new"))
    write(table, {"new": 7})
    ForcedLength.validate_params(params("new"))
    with pytest.raises(ValueError, match="ignore_eos"):
        ForcedLength.validate_params(SamplingParams(ignore_eos=True, extra_args={KEY_XARG: "new"}))


def test_the_table_is_read_again_only_when_it_changed(table: Path) -> None:
    lengths = LengthTable(table)
    assert (lengths.length("three"), lengths.length("new")) == (3, None)
    table.chmod(0)  # to read it now would fail, unless we are root: so also count
    stat = table.stat()
    assert lengths.length("new") is None
    table.chmod(0o600)
    os.utime(table, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write(table, {"new": 4})
    assert lengths.length("new") == 4


@pytest.mark.parametrize("broken", [[], {"a": 0}, {"a": -1}, {"a": True}, {"a": "5"}, {"a": 1.5}])
def test_what_is_no_table(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(ValueError, match="no JSON object of positive lengths"):
        LengthTable(write(tmp_path / "t.json", broken)).length("a")


def test_no_table_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        LengthTable(tmp_path / "none.json").length("a")
    (tmp_path / "none.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        LengthTable(tmp_path / "none.json").length("a")
    with pytest.raises(ValueError, match="additional_config"):
        ForcedLength(SimpleNamespace(additional_config={}), torch.device("cpu"), False)  # type: ignore[arg-type]
