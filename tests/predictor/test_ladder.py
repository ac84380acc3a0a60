from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.features import HISTORY_COLUMNS
from predictor.ladder import MAX_CLASSES, OWN_AGENTS, PRIOR_DECODE_TOKENS, PRIOR_GROWTH, REMEMBERED_AGENTS, Ladder
from predictor.types import AgentProgress, FinishedAgent, FinishedTask


def agent(agent_class: str | None, *decodes: int, tenant: str = "t", prompt: int = 10) -> FinishedAgent:
    return FinishedAgent(agent_class, tenant, [FinishedTask(4 * prompt, prompt, 0, decode) for decode in decodes])


def taught(*agents: FinishedAgent) -> Ladder:
    ladder = Ladder()
    for one in agents:
        ladder.learn(one)
    return ladder


def decode(ladder: Ladder, agent_class: str | None, tenant: str = "t", max_tokens: int | None = None) -> float:
    return ladder.predict_task(agent_class, tenant, 400, max_tokens).decode_tokens


def total(ladder: Ladder, agent_class: str | None, tasks: int = 1, cost: float = 1, tenant: str = "t") -> float:
    """cost: of what has ended."""
    return ladder.predict_agent(AgentProgress(agent_class, tenant, tasks, cost_arrived=cost, cost_ended=cost)).cost


def test_before_anything_is_learned_there_is_a_prior_from_lengths() -> None:
    prediction = Ladder().predict_task("new", "t", 400)
    assert prediction.prompt_tokens == 100
    assert prediction.decode_tokens == pytest.approx(PRIOR_DECODE_TOKENS)
    assert total(Ladder(), "new", cost=77) == pytest.approx(77)


def test_the_narrowest_rung_that_has_seen_much_decides() -> None:
    ladder = taught(
        *[agent("a", 10, tenant="t")] * 50, *[agent("a", 30, tenant="u")] * 50, *[agent("b", 90, tenant="v")] * 50
    )
    everybody = decode(ladder, "new", "w")
    assert decode(ladder, "a", "t") == pytest.approx(10, rel=0.05)
    assert decode(ladder, "a", "u") == pytest.approx(30, rel=0.05)
    assert 10 < decode(ladder, "a", "v") < 30, "of the class, by another tenant"
    assert decode(ladder, "new", "v") == pytest.approx(90, rel=0.05), "of the tenant"
    assert everybody == pytest.approx(math.sqrt(30 * 90), rel=0.05), "the geometric mean of the last hundred"


def test_each_agent_of_a_new_class_moves_it_from_what_others_do_to_what_its_own_do() -> None:
    others = [agent("b", 400)] * 50
    seen = [decode(taught(*others, *[agent("a", 10)] * count), "a") for count in (0, 1, 3, 10, 50)]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == pytest.approx(400, rel=0.05)
    assert seen[1] < 200, "one agent counts for something"
    assert seen[2] < 60, "three for most"
    assert seen[4] == pytest.approx(10, rel=0.1)


def test_the_clients_limit_bounds_the_decode_length() -> None:
    assert decode(Ladder(), None, max_tokens=7) == 7


def test_tokens_per_byte_are_learned() -> None:
    ladder = taught(FinishedAgent("a", "t", [FinishedTask(100, 50, 0, 1)]))
    assert ladder.predict_task("a", "t", 400).prompt_tokens == 200


def test_the_total_is_that_of_its_kind_however_little_has_come() -> None:
    ladder = taught(*[agent("a", 40, 40)] * 50)
    assert total(ladder, "a") == pytest.approx(agent("a", 40, 40).cost, rel=0.05)


def test_the_total_grows_with_the_agent() -> None:
    small, large = agent("a", 4), agent("a", 4, 4, 4, 4)
    ladder = taught(*[small] * 50, *[large] * 50)
    both = total(ladder, "a")
    assert small.cost < both < large.cost
    assert total(ladder, "a", tasks=2, cost=10) == pytest.approx(large.cost, rel=0.05), "a small one has one task only"
    assert total(ladder, "a", cost=small.cost + 1) == pytest.approx(large.cost, rel=0.05)
    outgrown = total(ladder, "a", tasks=4, cost=1000)
    assert outgrown >= 1000 * (1 + PRIOR_GROWTH), "past all of its kind"


def test_of_strangers_it_is_learned_how_agents_grow() -> None:
    """Ten equal tasks each: who has shown one will have ten, how much they cost here or there."""
    ladder = taught(*[agent("b", *[4] * 10, prompt=500)] * 50)
    assert total(ladder, "new", tenant="u", cost=70) == pytest.approx(700, rel=0.1)


def test_how_sure_it_is() -> None:
    """Nine of ten cost at most the ninth decile."""
    same, spread = taught(*[agent("a", 40)] * 100), taught(*[agent("a", 10 * 2**n) for n in range(6)] * 20)
    sure = same.predict_agent(AgentProgress("a", "t", 1, cost_arrived=1))
    unsure = spread.predict_agent(AgentProgress("a", "t", 1, cost_arrived=1))
    assert sure.cost < sure.p90 < 1.3 * sure.cost
    assert unsure.p90 > 3 * unsure.cost


def test_only_the_last_agents_are_remembered() -> None:
    ladder = taught(*[agent("a", 10)] * REMEMBERED_AGENTS, *[agent("a", 50)] * REMEMBERED_AGENTS)
    assert decode(ladder, "a") == pytest.approx(50, rel=0.01)
    assert total(ladder, "a") == pytest.approx(agent("a", 50).cost, rel=0.01)


def test_names_that_clients_make_up_do_not_fill_the_memory() -> None:
    ladder = taught(*[agent("kept", 10)] * 30)
    for number in range(MAX_CLASSES + 100):
        ladder.learn(agent(f"class-{number}", 1))
        if number % 100 == 0:
            ladder.learn(agent("kept", 10))
    assert ladder.remembered == MAX_CLASSES
    assert decode(ladder, "kept") == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("agent_class", [None, "rag", "run"], ids=["of no class", "of its class", "of many classes"])
def test_what_one_tenant_does_neither_moves_nor_erases_another_tenants_classes(agent_class: str | None) -> None:
    """blue's client puts the number of its run into the class, or uses the name that red uses."""
    ladder = taught(*[agent("rag", 500, tenant="red")] * 100)
    before = ladder.predict_agent(AgentProgress("rag", "red", 1, cost_arrived=1)), decode(ladder, "rag", "red")
    history = ladder.history("rag", "red")
    for number in range(MAX_CLASSES + 100):
        ladder.learn(agent(f"run-{number}" if agent_class == "run" else agent_class, 1, tenant="blue"))
    after = ladder.predict_agent(AgentProgress("rag", "red", 1, cost_arrived=1)), decode(ladder, "rag", "red")
    assert after == before
    assert ladder.history("rag", "red") == history


def test_a_class_that_several_tenants_use_is_known_to_a_tenant_that_is_new_to_it() -> None:
    ladder = taught(*[agent("other", 400, tenant="v")] * 100, *[agent("a", 10, tenant="t")] * 50)
    alone = decode(ladder, "a", "new")
    assert alone == pytest.approx(decode(ladder, "unknown", "new")), "of one tenant it is that tenant's own"
    ladder.learn(agent("a", 10, tenant="u"))
    assert decode(ladder, "a", "new") == pytest.approx(10, rel=0.1), "with what was known before"


def test_a_tenant_of_few_agents_is_helped_by_others_until_it_has_its_own() -> None:
    others = [agent("a", 10, tenant=tenant) for tenant in "uv"] * 50
    seen = [decode(taught(*others, *[agent("a", 90)] * own), "a") for own in range(OWN_AGENTS + 1)]
    assert seen == sorted(seen) and seen[0] == pytest.approx(10, rel=0.1)
    assert seen[-1] == decode(taught(*[agent("a", 90)] * OWN_AGENTS), "a"), "then it is as if it were alone"


def test_a_class_that_is_forgotten_of_all_but_one_tenant_is_that_ones_again() -> None:
    ladder = taught(agent("a", 10, tenant="t"), agent("a", 10, tenant="u"))
    assert decode(ladder, "a", "new") < decode(ladder, "unknown", "new")
    for number in range(MAX_CLASSES):
        ladder.learn(agent(f"class-{number}", 100, tenant="u"))
    assert decode(ladder, "a", "new") == decode(ladder, "unknown", "new")


def test_an_agent_without_tasks_teaches_nothing() -> None:
    assert taught(FinishedAgent("a", "t", [])).remembered == 0


def test_the_history_is_that_of_the_narrowest_rung_and_follows_what_is_learned() -> None:
    ladder = taught(agent("a", 10), agent("a", 30), agent("b", 90))
    of_a = dict(zip(HISTORY_COLUMNS, ladder.history("a", "t"), strict=True))
    assert of_a["class_agents"] == pytest.approx(math.log1p(2))
    assert of_a["class_decode"] == pytest.approx((math.log(10) + math.log(30)) / 2)
    assert ladder.history("a", "t") == ladder.history("a", "t")
    ladder.learn(agent("a", 10))
    assert ladder.history("a", "t")[0] == pytest.approx(math.log1p(3))
    assert ladder.history("new", "t")[0] == pytest.approx(math.log1p(4)), "of the tenant"
    nobody = Ladder().history("a", "t")
    assert nobody[0] == 0 and all(map(math.isnan, nobody[1:]))


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", None]), st.lists(st.integers(0, 10**6), min_size=1, max_size=4)),
        max_size=8,
    ),
    st.sampled_from(["a", "c", None]),
    st.integers(0, 10**9),
    st.integers(1, 100),
    st.floats(0, 1e15),
)
def test_never_a_nan_and_never_less_than_what_has_arrived(
    taught_with: list[tuple[str | None, list[int]]],
    agent_class: str | None,
    prompt_bytes: int,
    tasks: int,
    cost: float,
) -> None:
    ladder = taught(*[agent(known, *decodes) for known, decodes in taught_with])
    prediction = ladder.predict_task(agent_class, "t", prompt_bytes)
    assert math.isfinite(prediction.cost)
    assert prediction.decode_tokens >= 1
    predicted = ladder.predict_agent(AgentProgress(agent_class, "t", tasks, cost_arrived=cost))
    assert math.isfinite(predicted.p90)
    assert predicted.p90 >= predicted.cost >= cost
