"""Every setting, once: name, default, bounds, and a sentence of help.

A flag (`--max-queue-s 60`) goes over the environment (`JUSTITIA_MAX_QUEUE_S`), over a TOML file (`--config`, or
`JUSTITIA_CONFIG`), over the default. A name that is not known is an error in all three. What `export` or `predictor …` takes
beyond what it shares with the gateway is no variable: one that is set for all commands would mean something to that one alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

PREFIX = "JUSTITIA_"
OTHER_PREFIXES = ("JUSTITIA_DEMO_", "JUSTITIA_REPLAY_", "JUSTITIA_EVALUATE_")
PolicyName = Literal["justitia", "fcfs", "agent-fcfs", "vtc", "las", "sjf", "srjf"]


def _state_home() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "justitia"


def cache_home() -> Path:
    """Where what can be made again is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "justitia"


def _default_state() -> str:
    return f"sqlite:///{_state_home() / 'state.db'}"


def command_config(env_prefix: str) -> SettingsConfigDict:
    """How the settings of every command are read."""
    return SettingsConfigDict(
        env_prefix=env_prefix,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )


class StateSettings(BaseSettings):
    """What the gateway shares with the commands that deal with what it has learned."""

    model_config = command_config(PREFIX)

    config: Path | None = Field(
        None, description="A TOML file with settings, one per line, named as here with _ for -."
    )
    state: str = Field(
        default_factory=_default_state,
        description="Where what was learned is kept: sqlite:///path, redis://host:port/db, or memory:.",
    )
    models: Path | None = Field(
        None,
        description="Directory of the predictor's models; default: `models` beside the state's file, or in"
        " `$XDG_STATE_HOME/justitia` with Redis; none with `memory:`.",
    )
    train_limit_s: float = Field(900, gt=0, description="Seconds that a training may take; then it is ended.")
    train_memory_mib: int = Field(2048, ge=512, description="Memory that a training may take, in MiB.")

    @field_validator("state")
    @classmethod
    def _state_url(cls, url: str) -> str:
        if url != "memory:" and not url.startswith(("sqlite:///", "redis://", "rediss://", "unix://")):
            raise ValueError("must be sqlite:///path, redis://host:port/db, or memory:")
        return url

    @property
    def models_directory(self) -> Path | None:
        if self.models is not None:
            return self.models.expanduser()
        if self.state == "memory:":
            return None
        if self.state.startswith("sqlite:///"):
            return Path(self.state.removeprefix("sqlite:///")).expanduser().parent / "models"
        return _state_home() / "models"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _SharedEnvironment(settings_cls), _SharedFile(settings_cls)


class _SharedEnvironment(EnvSettingsSource):
    """What is not the gateway's is a flag alone."""

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if name in ServeSettings.model_fields}


class _SharedFile(TomlConfigSettingsSource):
    """One file may hold the settings of all commands: what is another's is let be."""

    def __call__(self) -> dict[str, Any]:
        others = ServeSettings.model_fields.keys() - self.settings_cls.model_fields.keys()
        return {name: value for name, value in super().__call__().items() if name not in others}


class GatewaySettings(StateSettings):
    """`justitia gateway`: the gateway alone, before an engine that is already there."""

    engine: str = Field("", description="The engine: http://host:port, or unix:/path/to/socket.")
    link: str | None = Field(
        None,
        description="ZeroMQ address on which the engine's scheduler reports (ipc:///path). Without it, /metrics is polled.",
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Until keys are configured, everybody who reaches it is served."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    policy: PolicyName = Field("justitia", description="The order in which tasks are released.")
    beta: float = Field(
        1.0, gt=0, le=10, description="Share of the KV cache that what is in flight may come to hold, as predicted."
    )
    max_engine_waiting: int = Field(
        4, ge=0, description="Tasks in the engine's own queue above which none is released."
    )
    keep_kv: bool = Field(
        True, description="Keep the KV of an agent that waits for its tool for as long as it is worth it (own engine)."
    )
    max_in_flight: int | None = Field(
        None, ge=1, description="Tasks at the engine at once; default: what the engine says."
    )
    capacity_tokens: int | None = Field(
        None, ge=1, description="KV cache of the engine in tokens; default: what the engine says."
    )
    max_waiting: int = Field(10_000, ge=1, description="Tasks that may wait in the queue; more are refused with 429.")
    max_queue_s: float = Field(
        600, gt=0, description="Seconds a task may wait in the queue; then it is answered with 504."
    )
    max_body_mib: float = Field(64, gt=0, description="Largest body of a request, in MiB.")
    agent_idle_s: float = Field(300, gt=0, description="Seconds without a task after which an agent counts as ended.")
    drain_s: float = Field(
        30, ge=0, description="Seconds that tasks which wait or are in flight are given when the gateway stops."
    )
    kept_agents: int = Field(10_000, ge=1, description="Finished agents that are kept; the oldest go first.")
    keep_text: bool = Field(
        False,
        description="Keep also the texts of requests, up to 256 KiB each, for `justitia export --text`. They may be private.",
    )
    train: bool = Field(True, description="Train the predictor on finished agents, beside the gateway.")
    train_every: int = Field(
        200,
        ge=1,
        description="Finished agents after which a new model is trained; for the first time after 100, if that is less.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")
    max_waiting_mib: float = Field(
        1024, gt=0, description="Bodies that are held at once, in MiB: being sent, waiting, or in flight; more get 429."
    )
    max_connections: int = Field(
        10_000, ge=1, description="Client connections at once; above it idle ones are closed, then new ones refused."
    )
    keep_alive_s: float = Field(75, gt=0, description="Seconds that a connection without a request is kept open.")
    client_stall_s: float = Field(
        60,
        gt=0,
        description="Seconds that a client may take to send a request's head, and may make no progress with sending its"
        " body or reading its answer.",
    )

    @field_validator("engine")
    @classmethod
    def _engine_url(cls, url: str) -> str:
        if url and not url.startswith(("http://", "https://", "unix:/")):
            raise ValueError("must begin with http://, https:// or unix:/")
        return url.rstrip("/")


def _split(value: object) -> object:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


class ServeSettings(GatewaySettings):
    """`justitia serve`: the gateway and its own vLLM engine, on one machine."""

    model: str = Field(
        "tiny", description="Model to serve: a name or path that vLLM takes, or `tiny`, made on the spot."
    )
    runtime_dir: Path | None = Field(
        None, description="Directory for sockets and the engine's log; default: a temporary one."
    )
    kv_blocks: int | None = Field(
        None, ge=2, description="Blocks of KV cache; default: what the engine finds room for."
    )
    max_num_seqs: int | None = Field(None, ge=1, description="Tasks the engine runs at once; default: vLLM's.")
    max_model_len: int | None = Field(None, ge=1, description="Longest sequence in tokens; default: the model's.")
    engine_scheduler: Literal["justitia", "stock"] = Field(
        "justitia", description="The engine's scheduler: ours, or vLLM's own with `priority` alone."
    )
    displace_margin: float | None = Field(
        None,
        ge=0,
        description="Let an urgent task that finds no room displace tasks of agents whose finish tag is larger by more than"
        " this, in token·iterations; default: no task is displaced.",
    )
    engine_args: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="Further arguments for vLLM, as one string."
    )
    engine_start_s: float = Field(600, gt=0, description="Seconds the engine is given to start.")


Settings = TypeVar("Settings", bound=BaseSettings)


def load(settings: type[Settings], arguments: list[str], *, program: str) -> Settings:
    """The settings that flags, environment, file and defaults give together. Exits with 2 and a line on each that is wrong."""
    _refuse_unknown_names(settings)
    config = SettingsConfigDict(cli_prog_name=program)
    if "config" in settings.model_fields:
        config["toml_file"] = _config_file(arguments)
    with_file = type(settings.__name__, (settings,), {"model_config": config, "__doc__": settings.__doc__})
    try:
        return CliApp.run(with_file, cli_args=arguments)
    except ValidationError as error:
        wrong = [f"{program}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise SystemExit(_fail(*wrong)) from None


def _config_file(arguments: list[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get(f"{PREFIX}CONFIG"))
    path = parser.parse_known_args(arguments)[0].config
    if path is None:
        return None
    if not Path(path).is_file():
        raise SystemExit(_fail(f"config: no such file: {path}"))
    return Path(path)


def _refuse_unknown_names(settings: type[BaseSettings]) -> None:
    """A variable that begins like ours and is no setting is a slip of the pen. Other commands' settings are let be."""
    known = {f"{PREFIX}{name}".upper() for name in ServeSettings.model_fields}
    own = settings.model_config.get("env_prefix", "")
    if own != PREFIX:
        known |= {f"{own}{name}".upper() for name in settings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    others = tuple(prefix for prefix in OTHER_PREFIXES if prefix != own)
    unknown = [name for name in unknown if not name.startswith(others)]
    if unknown:
        raise SystemExit(_fail(*(f"environment: {name} is not a setting" for name in unknown)))


def _fail(*lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return 2
