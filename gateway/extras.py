"""Libraries that an installation may lack, and the extras of this distribution that bring them."""

from __future__ import annotations

from importlib.util import find_spec

_ENGINE = ("gpu", "cpu")
# By the name that is imported; where there are two extras, either brings it.
EXTRAS = {
    "aiohttp": ("demo,gpu", "demo,cpu"),  # a client before a real engine
    "matplotlib": ("demo",),
    "opentelemetry": ("otel",),
    "scipy": ("train",),
    "sklearn": ("dev",),
    "torch": _ENGINE,
    "transformers": _ENGINE,
    "vllm": _ENGINE,
    "xgboost": ("train",),
}


def missing(error: ModuleNotFoundError) -> str | None:
    """What to install, as a sentence's end; None if no extra brings what was not found."""
    module = (error.name or "").partition(".")[0]
    return how_to_get(module) if module in EXTRAS else None


def how_to_get(module: str) -> str:
    commands = " or ".join(f"pip install 'justitia[{extra}]'" for extra in EXTRAS[module])
    return f"needs {module}, which is not installed: {commands}"


def can_train() -> bool:
    """Whether models can be trained here."""
    return find_spec("xgboost") is not None
