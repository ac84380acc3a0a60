"""What agents that are served leave in the store: the rows that were predicted by, made of the requests as they came."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gateway.learning.export import traced
from gateway.protocol.body import parse_body
from gateway.protocol.texts import content_of
from gateway.state import open_store
from predictor.features import COLUMN, SCHEMA, is_kept, row
from predictor.learned import Learned
from predictor.registry import Registry
from predictor.types import AgentProgress, FinishedAgent
from tests.predictor.made import Gateway
from tests.wire.conftest import GatewayUnderTest, StartGateway

HEADERS = {"X-Agent-Class": "kind", "X-Agent-Tasks": "3"}
FIRST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name 12 rivers, please."}]


async def kept(gateway: GatewayUnderTest, state: str) -> list[FinishedAgent]:
    """When all that was served has been written."""
    await gateway.app.journal.flush()
    store = open_store(state)
    agents = [agent async for agent in store.read()]
    await store.close()
    return agents


async def test_the_row_that_is_kept_is_that_of_the_request(start: StartGateway, tmp_path: Path) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    gateway = await start(state=state, train=False)
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    fields: dict[str, Any] = {"messages": FIRST, "tools": tools, "max_tokens": 77}
    await gateway.chat("a", headers=HEADERS, **fields)
    await gateway.chat("a", headers={**HEADERS, "X-Agent-Final": "true"})
    (agent,) = await kept(gateway, state)
    assert (agent.agent_class, agent.schema, agent.expected_tasks) == ("kind", SCHEMA, 3)
    first, second = agent.tasks
    content = content_of(parse_body(msgspec.json.encode({"model": "tiny", **fields})))
    progress = AgentProgress("kind", "default", expected_tasks=3)
    arrival = Learned().arrive(content, progress)
    assert arrival.sketch is not None
    assert first.row == row(arrival.sketch, arrival.sketch, arrival.numbers).tobytes()
    columns = np.frombuffer(second.row, np.float32)
    assert columns[COLUMN["tasks_arrived"]] == pytest.approx(math.log1p(2))
    assert columns[COLUMN["expected_tasks"]] == pytest.approx(math.log1p(3))
    assert columns[COLUMN["opening_max_tokens"]] == pytest.approx(math.log1p(77))
    assert (first.prompt_tokens, first.decode_tokens, first.max_tokens) == (10, 4, 77)
    assert 0 == first.arrived_s <= first.ended_s <= second.arrived_s <= second.ended_s
    assert {task.prompt for task in agent.tasks} == {None}, "nobody asked for texts to be kept"


async def test_rows_of_long_agents_are_kept_for_some_of_their_tasks(start: StartGateway, tmp_path: Path) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    gateway = await start(state=state, train=False)
    for number in range(1, 21):
        final = {"X-Agent-Final": "true"} if number == 20 else {}
        await gateway.chat("a", headers={**HEADERS, **final})
    (agent,) = await kept(gateway, state)
    assert [bool(task.row) for task in agent.tasks] == [is_kept(number) for number in range(1, 21)]


async def test_texts_are_kept_when_the_user_wants_it(start: StartGateway, tmp_path: Path) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    gateway = await start(state=state, train=False, keep_text=True)
    final = {**HEADERS, "X-Agent-Final": "true"}
    await gateway.chat("a", headers=final, messages=FIRST)
    await gateway.chat("large", headers=final, messages=[{"role": "user", "content": "x" * 300_000}])
    await gateway.client.post("/v1/completions", json={"prompt": "Once upon"}, headers={"X-Agent-ID": "b", **final})
    texts = [(agent.tasks[0].system, agent.tasks[0].prompt) for agent in await kept(gateway, state)]
    assert texts == [("Be brief.", "Name 12 rivers, please."), (None, None), (None, "Once upon")]


async def test_what_was_served_can_be_exported(start: StartGateway, tmp_path: Path) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    gateway = await start(state=state, train=False)
    for number in range(3):
        final = {"X-Agent-Final": "true"} if number == 2 else {}
        await gateway.chat("a", headers={**HEADERS, **final}, n=1 + number)
    store = open_store(state)
    await gateway.app.journal.flush()
    (made,) = await traced(store.read())
    await store.close()
    assert {task.id: task.after for task in made.tasks} == {
        "t1": (),
        "t2.1": ("t1",),
        "t2.2": ("t1",),
        "t3.1": ("t2.1", "t2.2"),
        "t3.2": ("t2.1", "t2.2"),
        "t3.3": ("t2.1", "t2.2"),
    }


async def test_agents_are_listed_with_who_predicted_them_and_predictions_are_measured(
    gateway: GatewayUnderTest,
) -> None:
    await gateway.chat("a", headers=HEADERS)
    (listed,) = (await gateway.client.get("/v1/agents")).json()["data"]
    assert listed["predicted_by"] == "ladder"
    assert listed["predicted_p90"] >= listed["predicted_cost"] > 0
    for number in range(3):
        final = {**HEADERS, "X-Agent-Final": "true"}
        await gateway.chat(f"b{number}", headers=final, messages=[{"role": "user", "content": "x" * 100 * number}])
    told = (await gateway.client.get("/metrics")).text
    assert 'justitia_agent_cost_ratio_count{source="ladder"} 3.0' in told
    assert "justitia_prediction_seconds_count 4.0" in told
    assert "justitia_model_version 0.0" in told
    assert 'justitia_trainings_total{outcome="promoted"} 0.0' in told
    assert "justitia_recent_error NaN" not in told
    assert "justitia_model_recent_error NaN" in told


async def test_a_predictor_that_raises_is_counted_and_the_gateway_serves(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any) -> None:
        raise RuntimeError("as told")

    for name in ("arrive", "predict_agent", "learn"):
        monkeypatch.setattr(gateway.app.predictor, name, raises)
    assert (await gateway.chat("a")).status_code == 200
    (listed,) = (await gateway.client.get("/v1/agents")).json()["data"]
    assert listed["predicted_by"] == "none"
    assert (await gateway.chat("a", headers={"X-Agent-Final": "true"})).status_code == 200
    assert 'justitia_predictor_failures_total{part="predictor"} 2.0' in (await gateway.client.get("/metrics")).text


async def test_a_store_that_fails_is_counted_and_the_gateway_serves(start: StartGateway, tmp_path: Path) -> None:
    gateway = await start(state="redis://127.0.0.1:1/0", train=False, journal=tmp_path)
    assert (await gateway.chat("a", headers={"X-Agent-Final": "true"})).status_code == 200
    await gateway.app.journal.flush()
    await gateway.client.get("/metrics")
    errors = gateway.app.metrics.registry.get_sample_value("justitia_state_errors_total")
    assert errors is not None
    assert errors >= 2, "to recall, and to keep"


async def test_it_learns_while_it_serves(start: StartGateway, tmp_path: Path) -> None:
    """Agents that are kept, a real training in a process of its own, and the model serves the next that come."""
    state = f"sqlite:///{tmp_path}/state.db"
    store = open_store(state)
    for agent in Gateway().serve(150):
        await store.append(agent)
    await store.close()
    gateway = await start(state=state, train_every=100)
    await gateway.chat("before", headers=HEADERS)
    await gateway.until(lambda: gateway.app.learning.serves is not None)
    assert (await gateway.chat("after", headers=HEADERS)).status_code == 200
    listed = {agent["id"]: agent for agent in (await gateway.client.get("/v1/agents")).json()["data"]}
    assert listed["before"]["predicted_by"] in ("ladder", "xgboost-000001")
    assert listed["after"]["predicted_by"] == "xgboost-000001"
    await gateway.chat("whole", headers={**HEADERS, "X-Agent-Final": "true"})
    registry, promoted = gateway.app.metrics.registry, {"outcome": "promoted"}
    # The model may serve before the process that made it has ended.
    await gateway.until(lambda: registry.get_sample_value("justitia_trainings_total", promoted) == 1)
    told = (await gateway.client.get("/metrics")).text
    assert "justitia_model_version 1.0" in told
    assert 'justitia_agent_cost_ratio_count{source="model"} 1.0' in told
    assert 'justitia_predictor_failures_total{part="model"}' in told
    models = Registry(tmp_path / "models")
    models.promote(models.add(b"damaged"))
    await gateway.app.learning.look()
    assert (await gateway.chat("again", headers=HEADERS)).status_code == 200
    told = (await gateway.client.get("/metrics")).text
    assert "justitia_models_refused_total 1.0" in told
    assert "justitia_model_version 1.0" in told


async def test_a_model_that_fails_is_passed_over_and_counted(start: StartGateway, tmp_path: Path) -> None:
    gateway = await start(models=tmp_path)

    class Fails:
        name = "fails"

        def predict(self, row: Any) -> Any:
            raise RuntimeError("as told")

    gateway.app.predictor.model = Fails()  # type: ignore[attr-defined]
    assert (await gateway.chat("a")).status_code == 200
    (listed,) = (await gateway.client.get("/v1/agents")).json()["data"]
    assert listed["predicted_by"] == "ladder"
    told = (await gateway.client.get("/metrics")).text
    assert 'justitia_predictor_failures_total{part="model"} 1.0' in told
    assert 'justitia_predictor_failures_total{part="predictor"} 0.0' in told


async def test_where_no_model_can_be_written_trainings_fail_and_the_gateway_serves(
    start: StartGateway, tmp_path: Path
) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    store = open_store(state)
    for agent in Gateway().serve(100):
        await store.append(agent)
    await store.close()
    gateway = await start(state=state, models="/proc/models")
    failed = {"outcome": "failed"}
    registry = gateway.app.metrics.registry
    await gateway.until(lambda: registry.get_sample_value("justitia_trainings_total", failed) == 1)
    assert (await gateway.chat("a")).status_code == 200


async def test_the_gateway_stops_though_a_training_runs(start: StartGateway, tmp_path: Path) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    store = open_store(state)
    for agent in Gateway().serve(100):
        await store.append(agent)
    await store.close()
    gateway = await start(state=state)
    lock = tmp_path / "models" / "training.lock"
    await gateway.until(lock.exists)
    async with asyncio.timeout(20):
        await gateway.running.stop()
    with lock.open("ab") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)  # when the trainer is gone


@pytest.mark.parametrize("settings", [{}, {"models": "kept"}])
async def test_with_the_state_in_memory_nothing_is_trained_and_that_is_said_once(
    start: StartGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, str]
) -> None:
    with caplog.at_level(logging.INFO):
        await start(**{name: tmp_path / value for name, value in settings.items()})
    assert caplog.text.count("the state is in memory (--state)") == 1
