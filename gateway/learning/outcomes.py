"""What is learned from an agent that has ended: how good its prediction was, and what such an agent costs."""

from __future__ import annotations

from gateway.flowcontrol import Ended
from gateway.learning.accuracy import Accuracy, kind
from gateway.learning.guarded import GuardedPredictor
from gateway.telemetry.metrics import Metrics
from predictor.types import FinishedAgent


class Outcomes:
    """Ended agents, for the predictor, the accuracy and the metrics."""

    def __init__(self, predictor: GuardedPredictor, accuracy: Accuracy, metrics: Metrics) -> None:
        self._predictor, self._accuracy, self._metrics = predictor, accuracy, metrics

    def ended(self, ended: Ended) -> None:
        """Only an agent all of whose tasks were completed shows what such an agent costs."""
        agent, record = ended.finished, ended.record
        if agent is None:
            return
        self._metrics.agents.finished(record.tenant, record.agent_class, ended.jct_s)
        if record.predicted is not None and record.judged is not None:
            by = record.judged
            judged = self._accuracy.judge(by.source, record.predicted, max(by.p90, record.predicted), agent.cost)
            if judged is not None:
                ratio = judged.observed / judged.predicted
                self._metrics.learning.judged(kind(by.source), ratio, below_p90=judged.observed <= judged.p90)
        self.learn(agent)

    def learn(self, agent: FinishedAgent) -> None:
        self._predictor.learn(agent)
