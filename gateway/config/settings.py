"""Every setting, once: name, default, bounds, unit in the name, and a sentence of help. `sources` says where they come from."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, CliSuppress, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "JUSTITIA_"
MIB = 2**20
# Of a path to a Unix socket, in bytes.
LONGEST_SOCKET_PATH = 107

T = TypeVar("T")
# A setting that can be changed while the gateway serves: see `reload`.
Reloadable = Annotated[T, Field(json_schema_extra={"reload": True})]
TENANT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
TenantName = Annotated[str, StringConstraints(pattern=TENANT_NAME)]
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
        allow_inf_nan=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )


def _no_truth_for_a_number(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Python takes true for 1."""
    if isinstance(value, bool) and info.field_name is not None:
        annotation = cls.model_fields[info.field_name].annotation
        kinds = {annotation, *get_args(annotation)}
        if kinds & {int, float} and bool not in kinds:
            raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


class StateSettings(BaseSettings):
    """What the gateway shares with the commands that deal with what it has learned."""

    model_config = command_config(PREFIX)

    config: Path | None = Field(
        None,
        description="The settings file, in YAML; default: `justitia.yaml` in the working directory, if it is there.",
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
    journal: Path | None = Field(
        None,
        description="Directory of what the state does not have yet; default: `journal` beside the state's file, or in"
        " `$XDG_STATE_HOME/justitia` with Redis; none with `memory:`.",
    )
    train_limit_s: Reloadable[float] = Field(
        900, gt=0, description="Seconds that a training may take; then it is ended."
    )
    train_memory_mib: Reloadable[int] = Field(2048, ge=512, description="Memory that a training may take, in MiB.")

    _numbers = field_validator("*", mode="before")(classmethod(_no_truth_for_a_number))

    @field_validator("state")
    @classmethod
    def _state_url(cls, url: str) -> str:
        if url != "memory:" and not re.match("sqlite:///.|rediss?://|unix://", url):
            raise ValueError("must be sqlite:///path, redis://host:port/db, or memory:")
        return url

    @property
    def models_directory(self) -> Path | None:
        if self.models is not None:
            return self.models.expanduser()
        return None if self.state == "memory:" else self._beside_state("models")

    @property
    def state_file(self) -> Path | None:
        """With SQLite."""
        path = self.state.removeprefix("sqlite:///")
        return None if path == self.state else Path(path).expanduser()

    def _beside_state(self, name: str) -> Path:
        return (_state_home() if self.state_file is None else self.state_file.parent) / name

    @property
    def journal_directory(self) -> Path | None:
        """Of this state only: what one has not taken is not for another."""
        if self.state == "memory:":
            return None
        if self.state_file is not None:
            name = self.state_file.name
        else:  # without the password, which may change
            url = urlsplit(self.state)
            place = f"{url.hostname or ''}-{url.port or ''}{url.path}-{url.query if url.scheme == 'unix' else ''}"
            name = re.sub(r"[^\w.]+", "-", place).strip("-")
        return (self.journal or self._beside_state("journal")).expanduser() / name

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What it is given: `sources` reads the rest."""
        return (init_settings,)


class KeysSettings(StateSettings):
    """What the gateway shares with the commands that deal with keys."""

    keys: Reloadable[Path | None] = Field(
        None,
        description="File of the keys by which clients are known; default: `keys.json` beside the state's file, or in"
        " `$XDG_STATE_HOME/justitia` with Redis or `memory:`.",
    )

    @property
    def keys_file(self) -> Path:
        return self._beside_state("keys.json") if self.keys is None else self.keys.expanduser()


class TenantSettings(BaseModel):
    """What a tenant may have. What is not said is not limited."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weight: float = Field(1.0, gt=0, le=1e6, description="Share among tenants.")
    max_tasks: int | None = Field(None, ge=1, description="Tasks at once, waiting and in flight.")
    max_waiting: int | None = Field(None, ge=1, description="Tasks that may wait in the queue.")
    max_waiting_mib: float | None = Field(None, gt=0, description="Bodies of tasks that wait, in MiB together.")
    max_queue_s: float | None = Field(
        None, gt=0, description="Seconds a task may wait in the queue; default: the gateway's."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, le=10**12, description="Prompt and completion tokens a minute; cached ones do not count."
    )
    kv_per_day: float | None = Field(None, gt=0, description="KV token·iterations a day, in UTC.")
    max_agent_weight: float = Field(1.0, gt=0, le=1e6, description="Largest `X-Agent-Weight` that its clients may set.")
    admin: bool = Field(False, description="Its keys may see the use, and see and end the agents, of all tenants.")

    _numbers = field_validator("*", mode="before")(classmethod(_no_truth_for_a_number))


def _filled(tenants: object) -> object:
    """`red:`, with nothing after it, is a tenant without limits."""
    if tenants is None:
        return {}
    if not isinstance(tenants, dict):
        return tenants
    return {name: {} if tenant is None else tenant for name, tenant in tenants.items()}


Tenants = Annotated[
    dict[TenantName, TenantSettings],
    BeforeValidator(_filled, json_schema_input_type=dict[TenantName, TenantSettings | None] | None),
]


class GatewaySettings(KeysSettings):
    """`justitia gateway`: the gateway alone, before an engine that is already there."""

    engine: str = Field("", description="The engine: http://host:port, or unix:/path/to/socket.")
    engine_key: CliSuppress[SecretStr | None] = Field(
        None, description="Key that the engine asks for; it is sent instead of the client's."
    )
    link: str | None = Field(
        None,
        description="ZeroMQ address on which the engine's scheduler reports (ipc:///path). Without it, /metrics is polled.",
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Until keys are configured, everybody who reaches it is served."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    tenants: CliSuppress[Reloadable[Tenants]] = Field({}, description="What each tenant may have, by its name.")
    policy: Reloadable[PolicyName] = Field("justitia", description="The order in which tasks are released.")
    beta: Reloadable[float] = Field(
        1.0, gt=0, le=10, description="Share of the KV cache that what is in flight may come to hold, as predicted."
    )
    max_engine_waiting: Reloadable[int] = Field(
        4, ge=0, description="Tasks in the engine's own queue above which none is released."
    )
    keep_kv: bool = Field(
        True, description="Keep the KV of an agent that waits for its tool for as long as it is worth it (own engine)."
    )
    max_in_flight: Reloadable[int | None] = Field(
        None, ge=1, description="Tasks at the engine at once; default: what the engine says."
    )
    capacity_tokens: Reloadable[int | None] = Field(
        None, ge=1, description="KV cache of the engine in tokens; default: what the engine says."
    )
    max_waiting: Reloadable[int] = Field(
        10_000, ge=1, description="Tasks that may wait in the queue; more are refused with 429."
    )
    max_waiting_mib: Reloadable[float] = Field(
        1024, gt=0, description="Bodies of tasks that wait, in MiB together; more are refused with 429."
    )
    max_queue_s: Reloadable[float] = Field(
        600, gt=0, description="Seconds a task may wait in the queue; then it is answered with 504."
    )
    max_body_mib: Reloadable[float] = Field(64, gt=0, description="Largest body of a request, in MiB.")
    agent_idle_s: Reloadable[float] = Field(
        300, gt=0, description="Seconds without a task after which an agent counts as ended."
    )
    drain_s: Reloadable[float] = Field(
        30, ge=0, description="Seconds that tasks which wait or are in flight are given when the gateway stops."
    )
    kept_agents: int = Field(10_000, ge=1, description="Finished agents that are kept; the oldest go first.")
    keep_text: Reloadable[bool] = Field(
        False,
        description="Keep also the texts of requests, up to 256 KiB each, for `justitia export --text`. They may be private.",
    )
    train: Reloadable[bool] = Field(True, description="Train the predictor on finished agents, beside the gateway.")
    train_every: Reloadable[int] = Field(
        200,
        ge=1,
        description="Finished agents after which a new model is trained; for the first time after 100, if that is less.",
    )
    log_level: Reloadable[Literal["debug", "info", "warning", "error"]] = Field(
        "info", description="How much is logged."
    )
    log_format: Literal["text", "json"] = Field("text", description="How it is logged, on standard error.")
    request_log: str = Field(
        "-",
        description="Where each request is logged when it has ended, as a line of JSON: `-` for standard output, `none`, or a"
        " path.",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector to which requests are sent as traces: http://host:4318 (OTLP over HTTP). Default:"
        " `$OTEL_EXPORTER_OTLP_ENDPOINT`, and no traces without it. Needs the extra `otel`.",
    )

    max_held_mib: Reloadable[float] = Field(
        2048,
        gt=0,
        description="Bodies of requests, in MiB together: being sent, waiting, or at the engine; more are refused with 429. Of"
        " several tenants, each leaves room for the others.",
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

    @property
    def max_held_bytes(self) -> int:
        return int(self.max_held_mib * MIB)

    @property
    def max_waiting_bytes(self) -> int:
        return int(self.max_waiting_mib * MIB)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * MIB)

    @field_validator("engine")
    @classmethod
    def _engine_url(cls, url: str) -> str:
        url = url.rstrip("/")
        if url and (why := _why_no_engine(url)):
            raise ValueError(why)
        return url

    @field_validator("otlp_endpoint")
    @classmethod
    def _otlp_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return url

    @field_validator("engine_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not re.fullmatch("[!-~]+", key.get_secret_value()):
            raise ValueError("must be one or more printable characters of ASCII, and no spaces")
        return key


def _why_no_engine(url: str) -> str | None:
    """Why this cannot be where an engine is."""
    if not url.startswith(("http://", "https://", "unix:/")):
        return "must begin with http://, https:// or unix:/"
    if url.startswith("unix:/"):
        long = len(url.removeprefix("unix:").encode()) > LONGEST_SOCKET_PATH
        return f"the path of a socket has at most {LONGEST_SOCKET_PATH} bytes" if long else None
    try:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0 or parts.query or parts.fragment or not re.fullmatch("[!-~]+", url):
            return "must be http://host:port"
    except ValueError as error:  # of the port, or of an address in brackets
        return f"is no URL: {error}"
    if parts.path.endswith("/v1"):
        return "must end before /v1, which is part of the paths that clients ask for"
    return None


def _split(value: object) -> object:
    """A line as for a shell, or a list of words and numbers."""
    if isinstance(value, str):
        return tuple(shlex.split(value))
    if not isinstance(value, list | tuple):
        return value
    return tuple(str(word) if isinstance(word, int | float) and not isinstance(word, bool) else word for word in value)


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
    engine_args: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_split, json_schema_input_type=str | list[str | float])
    ] = Field((), description="Further arguments for vLLM, as one string.")
    engine_start_s: float = Field(600, gt=0, description="Seconds the engine is given to start.")


class Live:
    """The settings that hold now: a reload puts others in their place. What it cannot change may also be read once."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
