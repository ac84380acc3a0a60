"""Whole runs: by hand where the numbers are round, and against each other where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, get_args

import msgspec
import pytest

pytest.importorskip("vllm")

from engine.lab.profile import StepProfile
from gateway.agent_trace import AgentTrace, Prefix, TaskTrace, TraceError
from gateway.flowcontrol.fairqueue import POLICIES
from gateway.replay.predictors import Believed, Exact, Noise, Serving, compute_cost
from gateway.replay.record import MEMORY_EVERY
from gateway.replay.results import AgentResult, Run, own_release
from gateway.replay.simulation import ReleaseName, Setup, simulate
from predictor.cost import task_cost
from predictor.learned import Learned

# An iteration takes 0.01 s whatever it computes; the cache holds 256 tokens.
PROFILE = StepProfile(
    name="by hand",
    description="",
    constant_s=0.01,
    per_prefill_token_s=0.0,
    per_decode_s=0.0,
    per_kv_token_s=0.0,
    kv_blocks=16,
    block_size=16,
    max_num_seqs=8,
    max_num_batched_tokens=512,
)
RELEASES: tuple[ReleaseName, ...] = get_args(ReleaseName)


def task(
    name: str, prompt: int, output: int, *after: str, think_s: float = 0.0, prefix: Prefix | None = None
) -> TaskTrace:
    return TaskTrace(name, prompt, output, after, think_s, prefix=prefix)


def agent(name: str, *tasks: TaskTrace, at_s: float = 0.0, tenant: str = "", kind: str = "") -> AgentTrace:
    return AgentTrace(name, at_s, tasks, agent_class=kind, tenant=tenant)


def alone(name: str, prompt: int, output: int, at_s: float = 0.0, tenant: str = "") -> AgentTrace:
    return agent(name, task("t", prompt, output), at_s=at_s, tenant=tenant)


def run(
    agents: list[AgentTrace],
    policy: str = "justitia",
    release: ReleaseName | None = None,
    beliefs: Believed | None = None,
    finished: Callable[[int], None] = lambda agents: None,
    **setup: Any,
) -> Run:
    given = Setup(**{"profile": PROFILE} | setup)
    own: Any = own_release(policy)
    return simulate(agents, policy, release or own, beliefs or Exact(given.cost), given, finished=finished)


def finish_s(run: Run) -> dict[str, float]:
    """To a hundredth of an iteration."""
    return {agent.agent_id: round(agent.finish_s, 4) for agent in run.agents}


def of(run: Run, name: str) -> AgentResult:
    return next(agent for agent in run.agents if agent.agent_id == name)


def mix() -> list[AgentTrace]:
    """Forty agents in the paper's proportions of small, medium and large ones, within a second: far more than 40 blocks
    can take."""
    rng = Random("mix")
    agents = []
    for i in range(40):
        tasks, prompt, output = rng.choices([(3, 40, 20), (8, 60, 40), (20, 90, 80)], [72, 26, 4])[0]
        lengths = [(rng.randint(prompt // 2, 2 * prompt), rng.randint(output // 2, 2 * output)) for _ in range(tasks)]
        agents.append(agent(f"a{i}", *(task(str(k), *length) for k, length in enumerate(lengths)), at_s=0.02 * i))
    return agents


def elephant_and_mice() -> list[AgentTrace]:
    elephant = agent("elephant", *(task(str(i), 60, 60) for i in range(40)))
    mice = [agent(f"mouse-{i}", task("0", 20, 20), task("1", 20, 20), at_s=0.2 * i + 0.05) for i in range(20)]
    return [elephant, *mice]


# By hand


@pytest.mark.parametrize("policy", POLICIES)
def test_one_task_takes_an_iteration_for_each_token_of_its_output(policy: str) -> None:
    """The prompt is computed in one iteration, which brings the first token."""
    one = run([alone("a", 100, 10, at_s=2.0)], policy)
    result, summary = one.agents[0], one.summary
    assert result.finish_s == pytest.approx(2.1)
    assert result.jct_s == pytest.approx(0.1)
    assert (result.cost, result.predicted_cost) == (1055, 1055)
    assert (summary.agents, summary.tasks, summary.iterations, summary.preemptions) == (1, 1, 10, 0)
    assert summary.makespan_s == pytest.approx(0.1)
    assert summary.mean_jct_s == summary.p50_jct_s == summary.max_jct_s == result.jct_s


def test_the_reference_of_one_task_by_hand() -> None:
    """256 tokens an iteration: 1055 token·iterations are done in the fifth. The real engine needs ten."""
    one = run([alone("a", 100, 10)], capacity="blocks")
    assert one.agents[0].reference_finish_s == pytest.approx(0.05)
    assert one.agents[0].lateness_s == pytest.approx(0.05)
    assert one.summary.worst_tag_lateness_iterations == 5


def test_the_bound_in_seconds_does_not_grow_while_the_engine_is_idle() -> None:
    apart = run([alone("a", 100, 10), alone("b", 100, 10, at_s=1000)]).summary
    assert apart.bound_s == pytest.approx(0.01 * apart.bound_iterations)


def test_a_long_prompt_is_computed_in_pieces() -> None:
    one = run([alone("a", 200, 10)], profile=replace(PROFILE, max_num_batched_tokens=64))
    assert one.agents[0].jct_s == pytest.approx(0.13)  # 64 + 64 + 64 + 8


def test_agents_go_one_after_another_in_the_order_of_their_tags() -> None:
    """208 tokens hold one of them: 100 + 100, or 100 + 50, which would be done first under fair sharing."""
    agents = [alone("large", 100, 100), alone("small", 100, 50)]
    assert finish_s(run(agents, kv_blocks=13)) == {"small": 0.5, "large": 1.5}
    assert finish_s(run(agents, "agent-fcfs", "memory", kv_blocks=13)) == {"large": 1.0, "small": 1.5}
    assert finish_s(run(agents, "sjf", "memory", kv_blocks=13)) == {"small": 0.5, "large": 1.5}


def test_when_all_are_released_at_once_the_engine_keeps_the_order() -> None:
    agents = [alone("large", 100, 100), alone("small", 100, 50)]
    assert finish_s(run(agents, "justitia", "all", kv_blocks=13)) == {"small": 0.5, "large": 1.5}
    assert finish_s(run(agents, "agent-fcfs", "all", kv_blocks=13)) == {"large": 1.0, "small": 1.5}


def test_weight_moves_a_tag() -> None:
    agents = [msgspec.structs.replace(alone("large", 100, 100), weight=4.0), alone("small", 100, 50)]
    assert finish_s(run(agents, kv_blocks=13)) == {"large": 1.0, "small": 1.5}


def test_two_that_fit_run_side_by_side() -> None:
    assert finish_s(run([alone("a", 50, 60), alone("b", 50, 40)])) == {"a": 0.6, "b": 0.4}


def test_who_arrives_during_an_iteration_comes_with_the_next() -> None:
    assert finish_s(run([alone("a", 20, 10), alone("b", 20, 5, at_s=0.033)])) == {"a": 0.1, "b": 0.09}


def test_first_come_is_by_arrival_whatever_the_order_of_the_lines() -> None:
    """One at a time. The last to come is the second task of the first agent, which is not the first line either."""
    chain = agent("chain", task("1", 100, 50), task("2", 100, 50, "1", think_s=0.3))
    agents = [alone("second", 100, 50, at_s=0.2), alone("first", 100, 50, at_s=0.1), chain]
    expected = {"first": 1.0, "second": 1.5, "chain": 2.0}
    assert finish_s(run(agents, "fcfs", "memory", kv_blocks=13)) == expected
    assert finish_s(run(agents, "fcfs", "all", kv_blocks=13)) == expected


def test_the_clock_jumps_to_the_next_arrival() -> None:
    agents = [alone("late", 20, 5, at_s=1000.5), alone("early", 20, 10, at_s=3.25)]
    both = run(agents)
    assert finish_s(both) == {"late": 1000.55, "early": 3.35}
    assert both.summary.iterations == 15
    assert both.summary.makespan_s == pytest.approx(1000.55 - 3.25)


def test_a_task_comes_when_the_last_of_those_before_it_has_ended_and_thought_is_over() -> None:
    """0.1 and 0.2 s side by side; the third thinks until 0.7 and takes 0.05; the first of all had thought for 0.3."""
    tasks = (task("m1", 20, 10), task("m2", 20, 20), task("r", 20, 5, "m1", "m2", think_s=0.5))
    assert finish_s(run([agent("a", *tasks)])) == {"a": 0.75}
    late = (task("m1", 20, 10, think_s=0.3), *tasks[1:])
    assert finish_s(run([agent("a", *late)])) == {"a": 0.95}
    twice = (*tasks[:2], task("r", 20, 5, "m1", "m2", "m1", think_s=0.5))
    assert finish_s(run([agent("a", *twice)])) == {"a": 0.75}


def test_stages() -> None:
    """A plan, two that follow it, one that follows both, and one that follows that and the plan: 5 + 20 + 5 + 5."""
    tasks = (
        task("last", 20, 5, "reduce", "plan"),
        task("reduce", 20, 5, "left", "right"),
        task("left", 20, 10, "plan"),
        task("right", 20, 20, "plan"),
        task("plan", 20, 5),
    )
    ends: list[int] = []
    one = run([agent("a", *tasks)], finished=ends.append)
    assert finish_s(one) == {"a": 0.35}
    assert ends == [1]
    assert of(one, "a").tasks == 5
    assert of(one, "a").cost == sum(each.cost for each in tasks)


def test_tenants_share_before_their_agents_do() -> None:
    """All alike and one at a time: whoever comes last waits for all others, unless they are of another tenant."""
    crowd = [alone(f"crowd-{i}", 100, 50, tenant="crowd") for i in range(4)]
    lone = alone("lone", 100, 50, tenant="lone")
    apart = finish_s(run([*crowd, lone], kv_blocks=13))
    assert sorted(apart.values()) == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert apart["lone"] <= 1.0
    together = [msgspec.structs.replace(each, tenant="") for each in (*crowd, lone)]
    assert finish_s(run(together, kv_blocks=13))["lone"] == 2.5
    assert finish_s(run([*crowd, lone], "agent-fcfs", "memory", kv_blocks=13))["lone"] == 2.5, "it knows no tenants"


def test_shared_beginnings_are_found_and_charged_net() -> None:
    """Four blocks of the first prompt are there for the second."""
    shared = Prefix("of-agent", 70, Prefix("of-class", 40))
    agents = [
        agent("first", task("t", 100, 10, prefix=shared)),
        agent("second", task("t", 100, 10, prefix=shared), at_s=1.0),
        agent("third", task("t", 100, 10, prefix=shared.parent), at_s=2.0),
    ]
    cached = run(agents, prefix_caching=True, charge="formula")
    assert [each.cached_tokens for each in cached.agents] == [0, 64, 32]
    assert [each.cost for each in cached.agents] == [task_cost(100, 10, hit) for hit in (0, 64, 32)]
    assert cached.summary.prefix_hit_rate == pytest.approx(96 / 300)
    without = run(agents)
    assert [each.cached_tokens for each in without.agents] == [0, 0, 0]
    assert [each.cost for each in without.agents] == [1055] * 3
    assert without.summary.prefix_hit_rate == 0


@pytest.mark.parametrize("prefix", [Prefix("none", 0), Prefix("inner", 40, Prefix("outer", 40))])
def test_a_beginning_that_adds_nothing_to_another_is_no_error(prefix: Prefix) -> None:
    agents = [agent(name, task("t", 100, 10, prefix=prefix), at_s=at_s) for name, at_s in (("a", 0.0), ("b", 1.0))]
    one = run(agents, prefix_caching=True)
    assert one.agents[1].cached_tokens == prefix.tokens // 16 * 16


def test_what_sharing_saves_is_not_left_in_flight() -> None:
    """No more is at the engine than eight tasks that run and four that wait."""
    shared = Prefix("all", 96)
    agents = [agent(f"a{i}", *(task(str(k), 100, 20, prefix=shared) for k in range(5))) for i in range(20)]
    one = run(agents, prefix_caching=True)
    assert one.summary.prefix_hit_rate > 0.8
    assert one.summary.bound_terms["R"] <= 12 * task_cost(100, 20)


def test_costs_of_computing() -> None:
    one = run([alone("a", 100, 10), alone("b", 20, 5)], cost=compute_cost)
    assert [each.predicted_cost for each in one.agents] == [110, 25]
    assert finish_s(one) == {"a": 0.1, "b": 0.05}


@pytest.mark.parametrize(
    ("long", "setup"), [((100, 157), {}), ((100, 109), {"kv_blocks": 13}), ((32000, 1000), {"kv_blocks": 10000})]
)
def test_what_the_engine_cannot_hold_is_refused_by_name(long: tuple[int, int], setup: dict[str, Any]) -> None:
    agents = [alone("fine", 20, 5), agent("vast", task("ok", 20, 5), task("monster", *long, "ok"))]
    with pytest.raises(TraceError, match=r"'monster' of agent 'vast'.*tokens long") as refused:
        run(agents, **setup)
    assert refused.value.line is None


def test_the_longest_that_the_engine_can_hold_is_served() -> None:
    assert finish_s(run([alone("a", 100, 156)])) == {"a": 1.56}


# Every policy, every release


@pytest.fixture(scope="module")
def crowded() -> list[AgentTrace]:
    """Sixteen agents of one to four tasks, some in stages, too many for sixteen blocks."""
    agents = []
    for i in range(16):
        tasks = [task(str(k), 20 + 7 * ((i + k) % 5), 10 + 9 * ((i * k) % 7)) for k in range(1 + i % 4)]
        if i % 3 == 0:
            tasks.append(task("end", 30, 12, *(each.id for each in tasks), think_s=0.1 * (i % 2)))
        agents.append(agent(f"a{i}", *tasks, at_s=0.05 * i, tenant=("x", "y")[i % 2], kind=f"k{i % 3}"))
    return agents


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_everything_ends_whoever_goes_first(policy: str, release: ReleaseName, crowded: list[AgentTrace]) -> None:
    ends: list[int] = []
    one = run(crowded, policy, release, finished=ends.append)
    assert ends == list(range(1, len(crowded) + 1))
    assert [each.agent_id for each in one.agents] == [each.agent_id for each in crowded]
    assert [each.cost for each in one.agents] == [each.cost for each in crowded]  # so all tokens were produced
    assert one.summary.tasks == sum(len(each.tasks) for each in crowded)
    for result, trace in zip(one.agents, crowded, strict=True):
        longest = max(each.output_tokens for each in trace.tasks)
        assert result.finish_s >= trace.arrival_s + 0.01 * longest - 1e-9
        assert result.jct_s == result.finish_s - trace.arrival_s
        assert result.lateness_s == result.finish_s - result.reference_finish_s
    assert sum(each.preemptions for each in one.agents) == one.summary.preemptions
    assert (one.summary.recomputed_tokens > 0) == (one.summary.preemptions > 0)
    assert 0 < one.summary.mean_kv_usage <= 1 or release == "all"


def test_what_is_released_by_what_there_is_room_for_is_preempted(crowded: list[AgentTrace]) -> None:
    """A control for the test above: its sums are not of noughts."""
    preemptions = {release: run(crowded, "fcfs", release).summary.preemptions for release in RELEASES}
    assert preemptions["engine"] > 0 and preemptions["all"] > 0
    assert preemptions["memory"] < preemptions["engine"]


@pytest.mark.parametrize("policy", ["justitia", "vtc"])
def test_the_stock_scheduler_serves_as_well(policy: str, crowded: list[AgentTrace]) -> None:
    one = run(crowded, policy, engine_scheduler="stock")
    assert [each.cost for each in one.agents] == [each.cost for each in crowded]


@pytest.mark.parametrize("beliefs", [lambda: Noise(1.0, 0), lambda: Serving(Learned())], ids=["noise", "ladder"])
def test_everything_ends_whatever_is_believed(beliefs: Callable[[], Believed], crowded: list[AgentTrace]) -> None:
    one = run(crowded, beliefs=beliefs())
    assert [each.cost for each in one.agents] == [each.cost for each in crowded]
    assert any(each.predicted_cost != each.cost for each in one.agents)
    assert one.summary.bound_terms["E"] > 0


def test_the_ladder_learns_while_it_serves() -> None:
    """Each that ends is known to those that come after it."""
    agents = [msgspec.structs.replace(alone(f"a{i}", 40, 20, at_s=float(i)), agent_class="k") for i in range(6)]
    costs = [each.predicted_cost for each in run(agents, beliefs=Serving(Learned())).agents]
    assert costs[0] > 10 * agents[0].cost
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(agents[0].cost, rel=0.3)


@pytest.mark.parametrize(
    ("policy", "setup"),
    [
        ("justitia", {}),
        ("justitia", {"prefix_caching": True}),
        ("vtc", {"memory_over_time": True}),
        ("las", {"engine_scheduler": "stock"}),
    ],
)
def test_the_same_run_twice_is_the_same_to_the_byte(
    policy: str, setup: dict[str, Any], crowded: list[AgentTrace]
) -> None:
    first, second = (msgspec.json.encode(run(crowded, policy, beliefs=Noise(0.5, 1), **setup)) for _ in range(2))
    assert first == second


def test_another_seed_of_noise_is_another_run(crowded: list[AgentTrace]) -> None:
    first, second = (run(crowded, beliefs=Noise(0.5, seed)) for seed in (1, 2))
    assert finish_s(first) != finish_s(second)


def test_decisions_are_timed_only_when_asked(crowded: list[AgentTrace]) -> None:
    untimed, timed = run(crowded[:5]), run(crowded[:5], timings=True)
    assert (untimed.summary.decision_us_p50, untimed.summary.decision_us_p99) == (None, None)
    p50, p99 = timed.summary.decision_us_p50, timed.summary.decision_us_p99
    assert p50 is not None and p99 is not None and 0 < p50 <= p99
    without = msgspec.structs.replace(timed.summary, decision_us_p50=None, decision_us_p99=None)
    assert msgspec.structs.replace(timed, summary=without) == untimed


def test_memory_over_time_is_noted_only_when_asked(crowded: list[AgentTrace]) -> None:
    one = run(crowded, "vtc", memory_over_time=True)
    assert run(crowded, "vtc").memory is None
    assert one.memory is not None
    samples = one.summary.iterations // MEMORY_EVERY
    assert len(one.memory.times_s) == samples > 3
    assert one.memory.times_s == sorted(one.memory.times_s)
    assert "others" in one.memory.tokens and len(one.memory.tokens) == 13
    held = [sum(of_all) for of_all in zip(*one.memory.tokens.values(), strict=True)]
    assert len(held) == samples and all(0 <= tokens <= 256 for tokens in held) and max(held) > 128
    assert msgspec.structs.replace(one, memory=None) == run(crowded, "vtc")


# What it is for


@pytest.fixture(scope="module")
def mixed() -> dict[str, Run]:
    return {policy: run(mix(), policy, kv_blocks=40, max_num_seqs=32) for policy in ("justitia", "vtc", "agent-fcfs")}


def test_justitia_is_faster_on_average_when_there_is_more_work_than_memory(mixed: dict[str, Run]) -> None:
    mean = {policy: run.summary.mean_jct_s for policy, run in mixed.items()}
    assert mean["justitia"] < 0.75 * mean["vtc"] < 0.75 * mean["agent-fcfs"]
    served = mixed["justitia"].summary.served_tokens
    assert 0.7 * 640 < served <= 640  # it is not for want of work


def test_nobody_is_later_than_the_bound_and_most_are_early(mixed: dict[str, Run]) -> None:
    summary = mixed["justitia"].summary
    assert summary.worst_tag_lateness_iterations <= summary.bound_iterations
    assert summary.no_later_than_reference > 0.8


def test_the_bound_holds_beside_an_elephant_and_not_without_the_order() -> None:
    """First come, first served is the control: the mice wait for the elephant."""
    late = {}
    for policy in ("justitia", "fcfs"):
        one = run(elephant_and_mice(), policy, kv_blocks=20)
        late[policy] = one.summary.worst_tag_lateness_iterations / one.summary.bound_iterations
        assert of(one, "elephant").jct_s > 5
    assert late["justitia"] <= 1 < 2 < late["fcfs"]
