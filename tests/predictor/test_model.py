"""A model's answers and its file: what fits is used, what does not is refused by name."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor import model as module
from predictor.features import COLUMN, COLUMNS, SCHEMA
from predictor.learned import Learned
from predictor.model import Boosted, ModelError, Settings, load
from predictor.train import train
from predictor.types import AgentProgress, TaskContent
from tests.predictor.made import Gateway

FAST = Settings(rounds=10, depth=3, learning_rate=0.3, columns_share=1.0)


@pytest.fixture(scope="module")
def model() -> Boosted:
    return train(Gateway().serve(90), settings=FAST, nthread=1, created="2026-11-26T00:00:00Z").model


@pytest.fixture
def path(tmp_path: Path, model: Boosted) -> Path:
    path = tmp_path / "000007.model"
    path.write_bytes(model.encoded())
    return path


def rows(agents: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    stored = [task.row for agent in Gateway(seed=9).serve(agents) for task in agent.tasks]
    return np.frombuffer(b"".join(stored), np.float32).reshape(-1, len(COLUMNS))


def test_a_file_holds_all_of_a_model(path: Path, model: Boosted) -> None:
    read = load(path)
    assert read.name == "xgboost-000007"
    assert read.told == model.told
    assert read.told.created == "2026-11-26T00:00:00Z" and read.told.settings == FAST
    for row in rows(5):
        assert read.predict(row) == model.predict(row)
    assert read.encoded() == model.encoded()


def test_one_row_is_answered_as_many_are(model: Boosted) -> None:
    several = rows(10)
    medians = model.medians(several)
    calibration = model.told.calibration
    for row, (log_cost, log_decode) in zip(several, medians, strict=True):
        answer = model.predict(row)
        first = row[COLUMN["tasks_arrived"]] == np.float32(math.log1p(1))
        assert answer.cost == pytest.approx(math.expm1(log_cost), rel=1e-5)
        assert answer.decode_tokens == pytest.approx(math.expm1(log_decode + calibration.decode_mean), rel=1e-5)
        p90 = calibration.cost_p90_first if first else calibration.cost_p90_later
        assert answer.cost_p90 == pytest.approx(math.expm1(log_cost + p90), rel=1e-5)
        assert answer.cost_p90 >= answer.cost


def test_a_row_of_another_size_is_refused(model: Boosted) -> None:
    with pytest.raises(ValueError, match="a row of shape"):
        model.predict(np.zeros(len(COLUMNS) - 1, np.float32))


def test_rows_without_a_guess_are_refused_and_what_is_unknown_is_not(model: Boosted) -> None:
    with pytest.raises(ValueError, match="guesses"):
        model.predict(np.full(len(COLUMNS), np.nan, np.float32))
    unknown = np.full(len(COLUMNS), np.nan, np.float32)
    unknown[[COLUMN["agent_guess"], COLUMN["decode_guess"]]] = 5
    assert all(map(math.isfinite, model.predict(unknown)))


@given(
    st.builds(
        TaskContent,
        prompt_bytes=st.sampled_from([0, 1, 2**21, 10**15]),
        system=st.binary(max_size=300),
        text=st.sampled_from([b"", b"a" * 2**21, b"1 of 99999\n" * 200_000, b"\n- x" * 5000, "ß🙂".encode() * 9000]),
        messages=st.sampled_from([0, 1, 10**6]),
        tools=st.sampled_from([0, 500, 10**9]),
        tool_bytes=st.sampled_from([0, 10**12]),
        max_tokens=st.sampled_from([None, 0, 1, 2**31, 10**18]),
        sequences=st.sampled_from([1, 128]),
        structured=st.booleans(),
    ),
    st.sampled_from(["a", "never-seen", "", "\ud800", None]),
    st.floats(0, 1e300),
    st.none() | st.integers(1, 10**12),
)
@settings(max_examples=60, deadline=None)
def test_whatever_a_client_sends_nothing_comes_out_that_is_no_number(
    model: Boosted, content: TaskContent, agent_class: str | None, cost: float, expected: int | None
) -> None:
    serving = Learned(model)
    first = serving.arrive(content, AgentProgress(agent_class, "t", expected_tasks=expected))
    progress = AgentProgress(
        agent_class, "t", 3, 2, cost, cost / 2, 1, expected, opening=first.sketch, latest=first.sketch
    )
    then = serving.arrive(content, progress)
    for arrival in (first, then):
        assert math.isfinite(arrival.task.decode_tokens) and arrival.task.decode_tokens >= 1
        assert math.isfinite(arrival.agent.cost) and math.isfinite(arrival.agent.p90)
        assert arrival.agent.p90 >= arrival.agent.cost > 0
    assert math.isfinite(serving.predict_agent(progress).cost)


def changed(path: Path, **changes: Any) -> None:
    """Contents changed as somebody would who has read the format; the checksum fits."""
    format_name, version, _, contents = msgspec.msgpack.decode(path.read_bytes())
    contents = msgspec.msgpack.encode(msgspec.msgpack.decode(contents) | changes)
    path.write_bytes(msgspec.msgpack.encode([format_name, version, hashlib.sha256(contents).digest(), contents]))


def test_a_model_of_other_columns_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(path, schema="1-0ld")
    with pytest.raises(ModelError, match=rf"000007\.model: made for rows of schema 1-0ld; this program makes {SCHEMA}"):
        load(path)


def test_a_program_of_another_schema_refuses_its_predecessors_model(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCHEMA", "9-later")
    with pytest.raises(ModelError, match="this program makes 9-later"):
        load(path)


def test_other_formats_and_versions_are_told(path: Path) -> None:
    _, _, digest, contents = msgspec.msgpack.decode(path.read_bytes())
    path.write_bytes(msgspec.msgpack.encode(["justitia-model", 2, digest, contents]))
    with pytest.raises(ModelError, match="format version 2; this program reads 1"):
        load(path)
    path.write_bytes(msgspec.msgpack.encode(["somebody-else", 1, digest, contents]))
    with pytest.raises(ModelError, match="of the format 'somebody-else'"):
        load(path)


def test_wherever_a_file_is_cut_or_changed_it_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for end in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError, match="no model, or damaged"):
            load(path)
    for odd in (b"\x94\xa1\xff", b"\x95\xa1x\x01\xc4\0\xc4\0" + b"\x91" * 100_000):  # no UTF-8; too deep
        path.write_bytes(odd)
        with pytest.raises(ModelError, match="no model, or damaged"):
            load(path)
    for place in np.random.default_rng(1).integers(0, len(whole), 60).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(ModelError, match=r"000007\.model: "):
            load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"leaves": b""}, "nodes and leaves do not match"),
        ({"columns": b"\0\0\0\x7f"}, "nodes and leaves do not match"),
        ({"depth": 60}, "2 outputs of depth 60"),
        ({"outputs": 0}, "0 outputs"),
        ({"outputs": 1}, "1 outputs instead of 2"),
    ],
)
def test_trees_that_cannot_be_asked(path: Path, model: Boosted, change: dict[str, Any], reason: str) -> None:
    changed(path, trees=msgspec.to_builtins(model.trees, builtin_types=(bytes,)) | change)
    with pytest.raises(ModelError, match=f"its trees cannot be asked: {reason}"):
        load(path)


def test_contents_of_another_shape(path: Path) -> None:
    changed(path, told=[1, 2])
    with pytest.raises(ModelError, match="its contents cannot be read"):
        load(path)


def test_no_file_and_no_permission(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.model: cannot be read: No such file"):
        load(tmp_path / "none.model")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.wire
def test_serving_loads_nothing_that_only_training_needs() -> None:
    code = (
        "import sys, predictor.learned, predictor.model, predictor.registry; "
        "print([name for name in ('xgboost', 'scipy', 'sklearn', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
