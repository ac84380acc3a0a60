"""The paper's predictor, as the yardstick: TF-IDF of the prompt, and a multi-layer perceptron of four layers for each class,
from 100 agents of it (Justitia, v1, section on prediction; sizes and training are ours, the paper does not tell them).

It knows an agent by the text of the task at hand. Of a class that it has not learned, and of an agent that has outgrown what
it says, the ladder speaks. It needs scikit-learn and torch, which are loaded when it learns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from predictor.features import sketch
from predictor.ladder import P90, Ladder
from predictor.types import (
    AgentPrediction,
    AgentProgress,
    Arrival,
    FinishedAgent,
    Predictor,
    TaskContent,
    TaskPrediction,
)

SAMPLES_PER_CLASS, FEWEST_SAMPLES = 100, 10
WORDS = 2_000  # of a class's vocabulary, the most frequent
HIDDEN = (256, 128, 64)
BATCH, EPOCHS, PATIENCE = 16, 300, 30
VALIDATED_SHARE = 0.2
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
# Of what a network adds to a class's mean, in standard deviations: what it has not seen, it cannot know.
MOST_DEVIATIONS = 4.0

Floats = NDArray[np.float32]


class MlpUnavailable(RuntimeError):
    """What it needs is not installed."""


class Sample(NamedTuple):
    """A finished agent. text: of its first task; cost: in token·iterations; decode_tokens: mean of a sequence."""

    agent_class: str | None
    text: str
    cost: float
    decode_tokens: float


class _OfClass(NamedTuple):
    """means, deviations: of log cost and log decode length; spread: standard deviation of log cost around what is said, of
    agents that were not learned from."""

    vectorizer: Any
    network: Any
    means: Floats
    deviations: Floats
    spread: float


class PaperMlp(Predictor):
    def __init__(self, seed: int = 0) -> None:
        self.ladder = Ladder()
        self._seed = seed
        self._classes: dict[str | None, _OfClass] = {}

    def fit(self, samples: Sequence[Sample]) -> None:
        """Of each class the newest, if there are enough. Raises `MlpUnavailable`."""
        of_class: dict[str | None, list[Sample]] = defaultdict(list)
        for sample in samples:
            if 0 < sample.cost < math.inf and 0 < sample.decode_tokens < math.inf:
                of_class[sample.agent_class].append(sample)
        for number, (agent_class, own) in enumerate(of_class.items()):
            newest = own[-SAMPLES_PER_CLASS:]
            if len(newest) >= FEWEST_SAMPLES:
                self._classes[agent_class] = _fitted(newest, self._seed + number)

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        """The row is empty: it does not learn from rows."""
        made = sketch(content)
        task = self.ladder.predict_task(progress.agent_class, progress.tenant, content.prompt_bytes, content.max_tokens)
        known = self._classes.get(progress.agent_class)
        if known is None:
            return Arrival(
                task, self.ladder.predict_agent(progress.with_task(content.sequences * task.cost, made)), made
            )
        log_cost, log_decode = _said(known, _text(content))
        decode_tokens = max(1.0, math.exp(log_decode))
        if content.max_tokens is not None:
            decode_tokens = max(1.0, min(decode_tokens, content.max_tokens))
        task = TaskPrediction(task.prompt_tokens, decode_tokens)
        progress = progress.with_task(content.sequences * task.cost, made)
        cost = math.exp(log_cost)
        if cost < progress.cost_arrived:
            return Arrival(task, self.ladder.predict_agent(progress), made)
        return Arrival(task, AgentPrediction(cost, cost * math.exp(P90 * known.spread), "mlp"), made)

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        return self.ladder.predict_agent(progress)

    def learn(self, agent: FinishedAgent) -> None:
        """The ladder does; the networks learn in `fit` only."""
        self.ladder.learn(agent)


def _text(content: TaskContent) -> str:
    return (content.system + b"\n" + content.text).decode("utf-8", "replace")


def _said(known: _OfClass, text: str) -> tuple[float, float]:
    import torch

    with torch.inference_mode():
        words = torch.from_numpy(known.vectorizer.transform([text]).toarray())
        answer = known.network(words)[0].clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS).numpy()
    log_cost, log_decode = (known.means + known.deviations * answer).tolist()
    return log_cost, log_decode


def _fitted(samples: Sequence[Sample], seed: int) -> _OfClass:
    try:
        import torch
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise MlpUnavailable(
            f"the paper's predictor needs torch and scikit-learn: pip install 'justitia[cpu,dev]' ({error})"
        ) from error

    of_words = r"\w+"
    vectorizer = TfidfVectorizer(max_features=WORDS, sublinear_tf=True, dtype=np.float32, token_pattern=of_words)
    try:
        words = vectorizer.fit_transform([sample.text for sample in samples]).toarray()
    except ValueError:  # there is not one word in all of the texts
        words = vectorizer.fit_transform(["nothing"] * len(samples)).toarray()
    truth = np.log([[sample.cost, sample.decode_tokens] for sample in samples]).astype(np.float32)
    means, deviations = truth.mean(axis=0), np.maximum(truth.std(axis=0), 1e-3)
    shuffled = np.random.default_rng(seed).permutation(len(samples))
    border = round(VALIDATED_SHARE * len(samples))
    validated, learned = shuffled[:border], shuffled[border:]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is so small is slower with more
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x, y = torch.from_numpy(words), torch.from_numpy((truth - means) / deviations)
            network = _trained(x[learned], y[learned], x[validated], y[validated])
            with torch.inference_mode():
                rest = (network(x[validated]) - y[validated])[:, 0].numpy() * deviations[0]
    finally:
        torch.set_num_threads(threads)
    return _OfClass(vectorizer, network, means, deviations, float(np.sqrt(np.mean(rest**2))))


def _trained(x: Any, y: Any, x_validated: Any, y_validated: Any) -> Any:
    """Of the epochs, the one that validates best."""
    import torch
    from torch import nn

    sizes = (x.shape[1], *HIDDEN)
    layers: list[Any] = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.ReLU(), nn.Dropout(0.2)]
    network = nn.Sequential(*layers, nn.Linear(sizes[-1], y.shape[1]))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, least, since = None, math.inf, 0
    for _ in range(EPOCHS):
        network.train()
        order: Any = torch.randperm(len(x))
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            loss: Any = nn.functional.mse_loss(network(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            validated = float(nn.functional.mse_loss(network(x_validated), y_validated))
        since += 1
        if validated < least:
            best, least, since = {name: kept.clone() for name, kept in network.state_dict().items()}, validated, 0
        if since == PATIENCE:
            break
    if best is not None:
        network.load_state_dict(best)
    return network
