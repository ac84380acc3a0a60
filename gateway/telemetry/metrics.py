"""Every metric, in one place: prefix `justitia_`, base units, bounded labels. Called by verb; the fair queue never sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Info

from gateway.flowcontrol.records import UsageRow
from gateway.protocol.errors import Outcome, Reason
from gateway.telemetry.counters import Counts, Distributions
from predictor.accuracy import WINDOW
from predictor.types import FinishedTask

# Clients choose the names of classes. A tenant may add at most as many as it leaves room for, so that one that makes up names
# leaves labels for the next; what is too much is `other`.
MAX_CLASSES = 2000
NO_CLASS, OTHER_CLASSES = "none", "other"
# Tenants have keys, so there are as many as somebody has made keys for.
MAX_TENANTS = 1000
OTHER_TENANTS = "other"
# Models are known by what the engine has answered, so that what clients ask for in vain fills no label.
MAX_MODELS = 100
OTHER_MODELS = "other"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_OVERHEAD_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_PREDICTION_SECONDS = (0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.005, 0.01, 0.1)
# As OpenTelemetry's conventions for generative AI advise.
_OPERATION_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_RATIO = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)


class TrainingOutcome(StrEnum):
    """of a training. unchanged: the new model was no better. too_few: agents to learn from. busy: another gateway, or a user,
    was training on the same models. late: it took too long, and was ended. killed: by somebody else, as when memory ran
    out."""

    PROMOTED = "promoted"
    UNCHANGED = "unchanged"
    TOO_FEW = "too_few"
    BUSY = "busy"
    FAILED = "failed"
    LATE = "late"
    KILLED = "killed"


class CutOff(StrEnum):
    """of a client's connection. invalid: no HTTP, or too much of it. slow: a head or a body did not come. unread: nor was an
    answer read. crowded: it was idle, and gave way to a new one. refused: there were too many, and none was idle."""

    INVALID = "invalid"
    SLOW = "slow"
    UNREAD = "unread"
    CROWDED = "crowded"
    REFUSED = "refused"


class ReloadOutcome(StrEnum):
    """of the settings. refused: something was wrong, and nothing has changed."""

    APPLIED = "applied"
    REFUSED = "refused"


class Metrics:
    def __init__(self, registry: CollectorRegistry, *, version: str, policy: str) -> None:
        self.registry = registry
        self._classes: set[str] = set()
        self._classes_by: defaultdict[str, int] = defaultdict(int)  # how many each tenant was the first to use
        self._tenants: set[str] = set()
        self._models: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"justitia_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"justitia_{name}", text, labels, registry=registry)

        # Of what happens at every request.
        def counts(name: str, text: str, *labels: str) -> Counts:
            return Counts(registry, f"justitia_{name}", text, labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Distributions:
            return Distributions(registry, f"justitia_{name}", text, buckets, labels)

        self._version = version
        self._build = Info("justitia_build", "Version and policy.", registry=registry)
        self.policy_is(policy)
        self._requests = counts("requests_total", "Requests by endpoint and outcome.", "endpoint", "outcome")
        self._request_s = histogram(
            "request_seconds", "From a request's arrival to its end.", _SECONDS, "endpoint", "outcome"
        )
        self._queue_s = histogram("queue_seconds", "Time waiting in the fair queue.", _SECONDS, "outcome")
        self._overhead_s = histogram(
            "gateway_overhead_seconds",
            "Time of a request spent neither in the queue nor waiting for the engine.",
            _OVERHEAD_SECONDS,
        )
        self._first_token_s = histogram(
            "time_to_first_token_seconds", "From arrival to the answer's first bytes.", _SECONDS
        )
        self._agent_jct_s = histogram(
            "agent_jct_seconds", "An agent's completion time: first arrival to last end.", _SECONDS, "agent_class"
        )
        self._cost_ratio = histogram(
            "agent_cost_ratio",
            "Observed cost of an agent over the one predicted at its first release, by who predicted it: model or ladder.",
            _RATIO,
            "source",
        )
        self._below_p90 = counter(
            "agents_below_p90_total",
            "Agents that cost at most the predicted ninth decile: calibrated, 0.9 of all.",
            "source",
        )
        self._agents_finished = counts("agents_finished_total", "Agents that have ended.", "agent_class")
        self._prompt_tokens = counts("prompt_tokens_total", "Prompt tokens, cached ones included.", "agent_class")
        self._completion_tokens = counts("completion_tokens_total", "Tokens decoded.", "agent_class")
        self._observed_cost = counts(
            "observed_cost_token_iterations_total", "True cost of tasks, KV token·iterations.", "agent_class"
        )
        self._rejected = counter("rejected_total", "Tasks handed back before they reached the engine.", "reason")
        for reason in Reason:
            self._rejected.labels(reason)
        self._tenant_rejected = counter("tenant_rejected_total", "The same, by tenant.", "tenant")
        self._tenant_requests = counts("tenant_requests_total", "Tasks that were charged.", "tenant")
        self._tenant_tokens = counts(
            "tenant_tokens_total", "Tokens by kind: prompt, cached (of the prompts'), completion.", "tenant", "kind"
        )
        self._tenant_cost = counts(
            "tenant_kv_token_iterations_total", "What tenants were charged, KV token·iterations.", "tenant"
        )
        self._agents = gauge("agents", "Agents by state: waiting, running (nothing waits), idle.", "state")
        self._tasks = gauge("tasks", "Tasks by state.", "state")
        self._kv_held = gauge("kv_held_tokens", "KV cache in use at the engine, tokens.")
        self._kv_capacity = gauge("kv_capacity_tokens", "KV cache of the engine, tokens (M).")
        self._kv_predicted = gauge(
            "kv_predicted_tokens", "The most KV that what is in flight is predicted to come to hold, tokens."
        )
        self._virtual_time = gauge(
            "virtual_time",
            "Virtual time of a tenant's agents in the fluid reference, token·iterations per unit of weight.",
            "tenant",
        )
        self._iterations = gauge("service_iterations", "Engine iterations done: the service clock.")
        self._engine_up = gauge("engine_up", "1 when the engine serves.")
        self._engine_running = gauge("engine_running", "Tasks that the engine runs.")
        self._engine_waiting = gauge("engine_waiting", "Tasks in the engine's own queue.")
        self._kv_kept = gauge(
            "kv_kept_tokens", "Free KV cache with what agents who wait for their tools will need, tokens."
        )
        self._preemptions = counter("preemptions_total", "Preemptions by the engine.")
        self._recomputed = counter(
            "recomputed_tokens_total", "Tokens that were computed, lost by preemption, and had to be computed again."
        )
        self._displaced = counter("displaced_total", "Of the preemptions: tasks that gave way to a more urgent one.")
        self._displaced_tokens = counter(
            "displaced_tokens_total", "Of the recomputed tokens: those of displaced tasks."
        )
        self._engine_restarts = counter("engine_restarts_total", "Restarts of the engine seen.")
        self._link_up = gauge("link_up", "1 when the engine's scheduler reports on the link.")
        self._link_reports = counter("link_reports_total", "Reports received on the link.")
        self._link_refused = counter(
            "link_refused_total",
            "Messages that the engine refused on the link: unreadable, of a stranger, or out of turn.",
        )
        self._link_lost = counter(
            "link_lost_total", "Messages to the engine that had to be sent again, or could not be sent."
        )
        self._held_ratio = histogram(
            "held_cost_ratio",
            "KV that a task held, as the engine counts it, over what the formula says without what was cached.",
            buckets=(0.25, 0.5, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0),
        )
        self._state_errors = counter("state_errors_total", "Failed reads and writes of the state store.")
        self._state_unreadable = gauge(
            "state_unreadable_agents",
            "Agents of the state store, and steps of the journal, that could not be read and were passed over.",
        )
        self._state_up = gauge("state_up", "1 when the state store answers; at 0 the gateway goes on alone.")
        self._state_waiting = gauge("state_waiting_bytes", "What is in the journal and not yet in the state store.")
        self._state_unwritten = counter(
            "state_unwritten_total",
            "Settled tasks that the journal's disk did not take: a kill would have cost them, until the store had them.",
        )
        self._state_given_up = counter(
            "state_given_up_total",
            "What was given up for good: finished agents, when the store was away for long; settled tasks.",
        )
        self._prediction_s = histogram(
            "prediction_seconds", "Time from a parsed request to what it is predicted to cost.", _PREDICTION_SECONDS
        )
        self._predictor_failures = counter(
            "predictor_failures_total",
            "Predictions that could not be had: of the model, where the ladder answered; of the predictor, where nobody did.",
            "part",
        )
        for part in ("model", "predictor"):
            self._predictor_failures.labels(part)
        self._recent_p90 = gauge(
            "recent_share_below_p90",
            f"Of the last {WINDOW} agents: the share that cost at most the predicted ninth decile.",
        )
        self._recent_order = gauge(
            "recent_order",
            f"Of the last {WINDOW} agents: Kendall's tau between predicted and observed cost; 1 is the right order.",
        )
        self._recent_error = gauge(
            "recent_error", f"Of the last {WINDOW} agents: median of |predicted - observed| / observed of their costs."
        )
        self._model_error = gauge(
            "model_recent_error", "The same, of those only that the model that serves has predicted."
        )
        self._model_validation_error = gauge(
            "model_validation_error",
            "The same, of agents that were held out when the model that serves was trained.",
        )
        self._model_version = gauge("model_version", "Version of the model that serves; 0: none, the ladder serves.")
        self._model_created = gauge(
            "model_created_timestamp_seconds",
            "When the model that serves was made, seconds since 1970; 0: none serves.",
        )
        self._models_refused = counter("models_refused_total", "Models that could not be loaded, and do not serve.")
        self._trainings = counter("trainings_total", "Trainings by outcome.", "outcome")
        for outcome in TrainingOutcome:
            self._trainings.labels(outcome)
        self._reloads = counter("reloads_total", "Times that the settings were read anew, by outcome.", "outcome")
        for reload_outcome in ReloadOutcome:
            self._reloads.labels(reload_outcome)
        self._training_s = gauge("training_seconds", "How long the last training took.")
        self._connections = gauge("connections", "Connections of clients.")
        self._cut_off = counter(
            "connections_cut_off_total",
            "Connections of clients that were ended before their time, by reason.",
            "reason",
        )
        for why in CutOff:
            self._cut_off.labels(why)
        self._log_dropped = counter(
            "request_log_dropped_total", "Lines of the request log that were lost: nobody took them, or not in time."
        )
        self._spans_dropped = counter(
            "spans_dropped_total", "Spans that were lost: no collector took them, or not in time."
        )

        def standard(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Distributions:
            labels = ("gen_ai_operation_name", "gen_ai_request_model", *labels)
            return Distributions(registry, f"gen_ai_server_{name}", text, buckets, labels)

        self._operation_s = standard(
            "request_duration_seconds",
            "OpenTelemetry's gen_ai.server.request.duration: from a task's arrival to its end.",
            _OPERATION_SECONDS,
            "error_type",
        )
        self._operation_first_token_s = standard(
            "time_to_first_token_seconds",
            "OpenTelemetry's gen_ai.server.time_to_first_token: of streams that were completed.",
            _FIRST_TOKEN_SECONDS,
        )
        self._operation_token_s = standard(
            "time_per_output_token_seconds",
            "OpenTelemetry's gen_ai.server.time_per_output_token: of streams that were completed, after the first token.",
            _TOKEN_SECONDS,
        )

    def policy_is(self, policy: str) -> None:
        self._build.info({"version": self._version, "policy": policy})

    def reloaded(self, outcome: ReloadOutcome) -> None:
        self._reloads.labels(outcome).inc()

    def request_ended(self, endpoint: str, outcome: Outcome, seconds: float) -> None:
        self._requests[endpoint, outcome].inc()
        self._request_s[endpoint, outcome].observe(seconds)

    def rejected(self, tenant: str, reason: Reason) -> None:
        self._rejected.labels(reason).inc()
        self._tenant_rejected.labels(self._tenant(tenant)).inc()

    def charged(self, row: UsageRow) -> None:
        """What a task used, or a correction of it. A counter cannot take anything back, so it does not."""
        label = self._tenant(row.tenant)
        if row.requests:
            self._tenant_requests[label,].inc(row.requests)
            self._tenant_tokens[label, "prompt"].inc(row.prompt_tokens)
            self._tenant_tokens[label, "cached"].inc(row.cached_tokens)
            self._tenant_tokens[label, "completion"].inc(row.completion_tokens)
        self._tenant_cost[label,].inc(max(0.0, row.kv_cost))

    def left_queue(self, outcome: Outcome, seconds: float) -> None:
        self._queue_s[outcome,].observe(seconds)

    def overhead(self, seconds: float) -> None:
        self._overhead_s[()].observe(max(0.0, seconds))

    def first_token(self, seconds: float) -> None:
        self._first_token_s[()].observe(seconds)

    def operation_ended(
        self,
        operation: str,
        model: str | None,
        outcome: Outcome,
        seconds: float,
        first_token_s: float | None,
        completion_tokens: int | None,
    ) -> None:
        """A task, under the names that OpenTelemetry has for it. first_token_s: after its arrival, if it was a stream."""
        completed = outcome is Outcome.COMPLETED
        label = self._model(model, served=completed)
        # No label is one that is empty.
        self._operation_s[operation, label, "" if completed else outcome].observe(seconds)
        if completed and first_token_s is not None:
            self._operation_first_token_s[operation, label].observe(first_token_s)
            if completion_tokens is not None and completion_tokens > 1:
                self._operation_token_s[operation, label].observe((seconds - first_token_s) / (completion_tokens - 1))

    def log_dropped(self, lines: int) -> None:
        self._log_dropped.inc(lines)

    def spans_dropped(self, count: int) -> None:
        self._spans_dropped.inc(count)

    def task_ended(self, tenant: str, agent_class: str | None, prompt_tokens: int, completion_tokens: int) -> None:
        label = self._class(tenant, agent_class)
        self._prompt_tokens[label,].inc(prompt_tokens)
        self._completion_tokens[label,].inc(completion_tokens)

    def task_charged(self, tenant: str, agent_class: str | None, task: FinishedTask) -> None:
        """Once for each task, when nothing more will be known of it."""
        self._observed_cost[self._class(tenant, agent_class),].inc(task.cost)
        if task.held is not None and task.net_cost > 0:
            self._held_ratio[()].observe(task.held / task.net_cost)

    def agent_finished(self, tenant: str, agent_class: str | None, jct_s: float) -> None:
        label = self._class(tenant, agent_class)
        self._agents_finished[label,].inc()
        self._agent_jct_s[label,].observe(jct_s)

    def agent_judged(self, source: str, ratio: float, *, below_p90: bool) -> None:
        """source: see `accuracy.kind`. ratio: observed cost over predicted."""
        self._cost_ratio[source,].observe(ratio)
        self._below_p90.labels(source).inc(below_p90)

    def predicted(self, seconds: float, *, failed: bool) -> None:
        self._prediction_s[()].observe(seconds)
        if failed:
            self._predictor_failures.labels("predictor").inc()

    def model_failed(self, count: int) -> None:
        self._predictor_failures.labels("model").inc(count)

    def predictions_are(self, *, below_p90: float, order: float, error: float, model_error: float) -> None:
        """NaN for what is not known yet."""
        self._recent_p90.set(below_p90)
        self._recent_order.set(order)
        self._recent_error.set(error)
        self._model_error.set(model_error)

    def model_serves(self, version: int, created_at: float, validation_error: float) -> None:
        """created_at: seconds since 1970."""
        self._model_version.set(version)
        self._model_created.set(created_at)
        self._model_validation_error.set(validation_error)

    def model_refused(self) -> None:
        self._models_refused.inc()

    def trained(self, outcome: TrainingOutcome, seconds: float) -> None:
        self._trainings.labels(outcome).inc()
        self._training_s.set(seconds)

    def queue_is(self, *, waiting: int, in_flight: int, predicted_tokens: float) -> None:
        self._tasks.labels("waiting").set(waiting)
        self._tasks.labels("in_flight").set(in_flight)
        self._kv_predicted.set(predicted_tokens)

    def virtual_time_is(self, tenant: str, virtual_time: float) -> None:
        self._virtual_time.labels(self._tenant(tenant)).set(virtual_time)

    def agents_are(self, *, waiting: int, running: int, idle: int) -> None:
        for state, count in (("waiting", waiting), ("running", running), ("idle", idle)):
            self._agents.labels(state).set(count)

    def engine_is(
        self,
        *,
        up: bool,
        link_up: bool,
        running: int,
        waiting: int,
        held_tokens: float,
        kept_tokens: float,
        capacity_tokens: float,
        iterations: float,
    ) -> None:
        self._engine_up.set(up)
        self._link_up.set(link_up)
        self._engine_running.set(running)
        self._engine_waiting.set(waiting)
        self._kv_held.set(held_tokens)
        self._kv_kept.set(kept_tokens)
        self._kv_capacity.set(capacity_tokens)
        self._iterations.set(iterations)

    def engine_counted(
        self, preempted: int, recomputed_tokens: int, displaced: int, displaced_tokens: int, refused: int
    ) -> None:
        """In the order of `capacity.Counters`."""
        self._preemptions.inc(preempted)
        self._recomputed.inc(recomputed_tokens)
        self._displaced.inc(displaced)
        self._displaced_tokens.inc(displaced_tokens)
        self._link_refused.inc(refused)

    def engine_restarted(self) -> None:
        self._engine_restarts.inc()

    def link_reported(self) -> None:
        self._link_reports.inc()

    def link_lost(self, count: int) -> None:
        self._link_lost.inc(count)

    def state_failed(self) -> None:
        self._state_errors.inc()

    def state_is(self, *, up: bool, waiting_bytes: int, unreadable: int) -> None:
        self._state_up.set(up)
        self._state_waiting.set(waiting_bytes)
        self._state_unreadable.set(unreadable)

    def _tenant(self, tenant: str) -> str:
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return OTHER_TENANTS
            self._tenants.add(tenant)
        return tenant

    def state_counted(self, errors: int, unwritten: int, given_up: int) -> None:
        """In the order of `journal.Counts`."""
        self._state_errors.inc(errors)
        self._state_unwritten.inc(unwritten)
        self._state_given_up.inc(given_up)

    def count_connections(self, count: Callable[[], float]) -> None:
        """They are counted at the time of the scrape."""
        self._connections.set_function(count)

    def connection_cut_off(self, why: CutOff) -> None:
        self._cut_off.labels(why).inc()

    def _class(self, tenant: str, agent_class: str | None) -> str:
        if agent_class is None:
            return NO_CLASS
        if agent_class not in self._classes:
            if self._classes_by[tenant] >= MAX_CLASSES - len(self._classes):
                return OTHER_CLASSES
            self._classes.add(agent_class)
            self._classes_by[tenant] += 1
        return agent_class

    def _model(self, model: str | None, *, served: bool) -> str:
        if model in self._models:
            return model
        if model is None or not served or len(self._models) >= MAX_MODELS:
            return OTHER_MODELS
        self._models.add(model)
        return model
