"""What a token of a prompt costs this engine, in iterations: what it would take to compute again what the KV cache holds."""

from __future__ import annotations

# Weight of the newest step, and prompt tokens above which a step counts as a measurement of prefill.
SMOOTHING = 0.05
PREFILL_TOKENS = 64


class StepTimes:
    """Measures steps: each takes until the next one is scheduled, unless there was a pause between."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._prefill_tokens = -1
        self._mean_s = self._decode_s = self._prefill_token_s = 0.0

    @property
    def prefill_iterations(self) -> float:
        """Mean iterations of this engine that a prompt's token takes; 0 until that is known."""
        return self._prefill_token_s / self._mean_s if self._mean_s else 0.0

    def step(self, now_s: float, prefill_tokens: int) -> None:
        """A step is scheduled now, with so many tokens of prompts."""
        before, took_s = self._prefill_tokens, now_s - self._since_s
        self._since_s, self._prefill_tokens = now_s, prefill_tokens
        if before < 0:
            return
        self._mean_s = _moved(self._mean_s, took_s)
        if not before:
            self._decode_s = _moved(self._decode_s, took_s)
        elif before >= PREFILL_TOKENS and self._decode_s:
            self._prefill_token_s = _moved(self._prefill_token_s, max(0.0, took_s - self._decode_s) / before)

    def pause(self) -> None:
        """Nothing is scheduled, so the time until the next step does not measure the step before."""
        self._prefill_tokens = -1


def _moved(mean: float, value: float) -> float:
    return mean + SMOOTHING * (value - mean) if mean else value
