"""How long an engine's iteration takes: what a virtual clock runs by.

One line through four numbers, since an iteration reads all weights once, computes its prefill tokens, samples for its
sequences, and reads the KV cache that they attend to. A profile also has the size of the engine that it was taken from.
Shipped ones lie in `engine/lab/profiles`; one of your own is a TOML file of the same keys.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "profiles"

_TEXTS = ("name", "description")
_SECONDS = ("constant_s", "per_prefill_token_s", "per_decode_s", "per_kv_token_s")
_SIZES = ("kv_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")


class ProfileError(ValueError):
    """There is no such profile, or it has values that no engine can have."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Seconds of one engine iteration: constant + per prefill token + per decoding sequence + per token of KV read."""

    name: str
    description: str  # where the numbers come from
    constant_s: float
    per_prefill_token_s: float
    per_decode_s: float
    per_kv_token_s: float
    kv_blocks: int  # usable ones; vLLM's null block comes on top
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    fit: dict[str, float] = field(default_factory=dict)  # how well they were fitted; empty for a calculation

    def __post_init__(self) -> None:
        for key in _SECONDS:
            value = getattr(self, key)
            if not math.isfinite(value) or value < 0:
                raise ProfileError(f"profile {self.name}: {key} = {value} is not a time")
        for key in _SIZES:
            value = getattr(self, key)
            if value < 1:
                raise ProfileError(f"profile {self.name}: {key} = {value} is not a size")
        for key, value in self.fit.items():
            if not math.isfinite(value):
                raise ProfileError(f"profile {self.name}: fit.{key} = {value} is not a number")
        if not any(getattr(self, key) for key in _SECONDS):
            raise ProfileError(f"profile {self.name}: its iterations take no time")

    def step_s(self, prefill_tokens: int, decodes: int, kv_tokens: int) -> float:
        return (
            self.constant_s
            + self.per_prefill_token_s * prefill_tokens
            + self.per_decode_s * decodes
            + self.per_kv_token_s * kv_tokens
        )


def shipped_profiles() -> list[str]:
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def load_profile(name_or_path: str) -> StepProfile:
    """A shipped profile by its name, or any by the path of its TOML file. Raises `ProfileError`."""
    shipped = shipped_profiles()
    path = SHIPPED / f"{name_or_path}.toml" if name_or_path in shipped else Path(name_or_path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(
            f"profile {name_or_path}: neither a file that can be read nor one of {', '.join(shipped)}"
        ) from error
    except ValueError as error:  # neither TOML nor UTF-8
        raise ProfileError(f"profile {name_or_path}: {error}") from error
    return _checked(name_or_path, table)


def _checked(source: str, table: dict[str, Any]) -> StepProfile:
    known = {f.name for f in fields(StepProfile)}
    if unknown := sorted(table.keys() - known):
        raise ProfileError(f"profile {source}: unknown keys: {', '.join(unknown)}")
    if missing := sorted(known - table.keys() - {"fit"}):
        raise ProfileError(f"profile {source}: missing keys: {', '.join(missing)}")
    fit = table.get("fit", {})
    if not isinstance(fit, dict):
        raise ProfileError(f"profile {source}: fit must be a table")
    numbers = {key: table[key] for key in (*_SECONDS, *_SIZES)} | {f"fit.{key}": value for key, value in fit.items()}
    for key, value in numbers.items():
        # TOML distinguishes true from 1, and Python does not.
        whole = key in _SIZES
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ProfileError(f"profile {source}: {key} must be {'a whole' if whole else 'a'} number")
    for key in _TEXTS:
        if not isinstance(table[key], str):
            raise ProfileError(f"profile {source}: {key} must be a text")
    return StepProfile(
        name=table["name"],
        description=table["description"].strip(),
        constant_s=float(table["constant_s"]),
        per_prefill_token_s=float(table["per_prefill_token_s"]),
        per_decode_s=float(table["per_decode_s"]),
        per_kv_token_s=float(table["per_kv_token_s"]),
        kv_blocks=table["kv_blocks"],
        block_size=table["block_size"],
        max_num_seqs=table["max_num_seqs"],
        max_num_batched_tokens=table["max_num_batched_tokens"],
        fit={key: float(value) for key, value in fit.items()},
    )
