"""The settings of `justitia demo`, apart from what it runs: its help is there without the libraries that it needs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings

from gateway.config.settings import command_config


class DemoSettings(BaseSettings):
    """`justitia demo`: replay a mix of agents as fcfs and as justitia before a real engine, and show what changed."""

    model_config = command_config("JUSTITIA_DEMO_")

    agents: int = Field(45, ge=10, le=1000, description="Agents in the trace; about 60, 30, 10 % small, medium, large.")
    seed: int = Field(7, ge=0, description="Seed of the trace.")
    window_s: float = Field(6.0, ge=0, description="Seconds within which the agents arrive.")
    scale: float = Field(1.0, gt=0, le=20, description="Factor on the width of medium and large agents.")
    history_agents: int = Field(60, ge=0, le=1000, description="Agents served first, for the predictor to learn from.")
    history_seed: int = Field(1007, ge=0, description="Seed of those; another than that of the trace.")
    kv_blocks: int = Field(128, ge=33, description="KV cache of the engine, in blocks of 32 tokens.")
    max_num_seqs: int = Field(64, ge=1, description="Tasks the engine runs at once.")
    target: float = Field(0.5, gt=0, description="Fail when the mean JCT is above this share of that under fcfs.")
    engine_start_s: float = Field(300, gt=0, description="Seconds the engine is given to start.")
    out: Path = Field(Path("demo-results"), description="Directory for the JSON, the picture, the trace and the logs.")

    @model_validator(mode="after")
    def _other_agents_first(self) -> DemoSettings:
        if self.history_agents and self.history_seed == self.seed:
            raise ValueError("history_seed must differ from seed: the predictor is not to have seen the trace")
        return self
