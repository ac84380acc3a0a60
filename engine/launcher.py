"""Starts the engine on this machine, keeps it running, and stops it without leaving a process behind.

The engine is vLLM's own OpenAI server in a process group of its own, on a Unix socket. Nothing in here imports vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import httpx

from engine import compat
from engine.cores import keep_apart
from engine.link import inbox

# Bytes of a Unix socket's path that every Linux takes (108 with the closing zero).
SOCKET_PATH_BYTES = 107
# A slash and a UUID: vLLM's names for the sockets between its processes.
RPC_NAME_BYTES = 37
# vLLM's CPU attention works on blocks of multiples of this many tokens.
CPU_BLOCK_SIZE = 32

HEALTH_INTERVAL_S = 0.25
HEALTH_TIMEOUT_S = 5.0
# Restarts wait this long, doubled each time, until the engine has stayed healthy long enough to be trusted again.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 1.0, 60.0
HEALTHY_S = 120.0
# An engine that has never been ready is given up after this many failures in a row: a wrong model does not get better.
FAILURES_BEFORE_READY = 3
LOG_MAX_BYTES = 64 * 2**20
LOG_CHECK_INTERVAL_S = 60.0
LOG_TAIL_LINES = 20

# Lines of the engine's log that mark the parts of a start, in vLLM's wording. Where it changes, only a progress text is lost.
MILESTONES = (
    (re.compile(r"non-default args"), "reading the model's configuration"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine's core"),
    (re.compile(r"Starting to load model"), "loading the model"),
    (re.compile(r"Model loading took"), "model loaded"),
    (re.compile(r"KV cache size: ([\d,]+) tokens"), "KV cache ready, {} tokens"),
    (re.compile(r"Starting vLLM server|Application startup complete"), "starting the server"),
)

ERROR_LINE = re.compile(r"\b[A-Za-z]+(Error|Exception): \S")

# Runs between fork and exec of the engine, in a fresh interpreter (a `preexec_fn` can deadlock beside threads): the
# kernel shall send SIGTERM when the launching process dies. It may have died before that.
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; "
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('the launcher is gone'); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)

logger = logging.getLogger(__name__)


class EngineState(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it ended by itself, and is started again after a pause
    FAILED = "failed"  # it ended by itself, and is not started again


class EngineFailed(Exception):
    """The engine did not become ready, or ended and is not started again."""

    def __init__(self, reason: str, exit_code: int | None = None, log_tail: tuple[str, ...] = ()) -> None:
        super().__init__("\n".join((reason, *(f"  | {line}" for line in log_tail))))
        self.reason = reason
        self.exit_code = exit_code  # negative for a signal; None when there was no process or it still ran
        self.log_tail = log_tail  # the log's last lines


@dataclass(frozen=True)
class EngineSpec:
    """What to start. None leaves a choice to vLLM. Raises `ValueError` for what cannot work."""

    model: str  # a directory, or a name on the model hub
    runtime_dir: Path  # for the sockets and the log
    kv_blocks: int | None = None
    block_size: int | None = None  # tokens
    max_num_seqs: int | None = None  # tasks that run at once
    max_model_len: int | None = None  # tokens
    kv_cache_gib: float | None = None
    forced_lengths: Path | None = None  # the table of `engine.lab.forced_length`
    scheduler: Literal["justitia", "stock"] = "justitia"
    displace_margin: float | None = None  # of our scheduler, as is the next: see `SchedulerSettings`
    link_interval_s: float | None = None
    extra_args: tuple[str, ...] = ()  # vLLM's own, after ours: the last one counts

    def __post_init__(self) -> None:
        # The engine is started in another directory than this process.
        object.__setattr__(self, "runtime_dir", self.runtime_dir.absolute())
        if self.forced_lengths is not None:
            object.__setattr__(self, "forced_lengths", self.forced_lengths.absolute())
        for socket in (self.socket, Path(inbox(self.link_address).removeprefix("ipc://"))):
            length = len(os.fsencode(socket))
            if length > SOCKET_PATH_BYTES:
                raise ValueError(
                    f"the socket's path {socket} has {length} bytes, and a Unix socket's may have {SOCKET_PATH_BYTES}: "
                    "choose a shorter runtime directory"
                )
        if self.block_size is not None and on_cpu() and self.block_size % CPU_BLOCK_SIZE:
            raise ValueError(f"block_size is {self.block_size}: on a CPU vLLM takes multiples of {CPU_BLOCK_SIZE}")

    @property
    def socket(self) -> Path:
        return self.runtime_dir / "engine.sock"

    @property
    def url(self) -> str:
        """`unix:/…/engine.sock`, where the engine serves HTTP."""
        return f"unix:{self.socket}"

    @property
    def link_address(self) -> str:
        """`ipc:///…/link.sock`, where a justitia scheduler publishes. A stock one does not."""
        return f"ipc://{self.runtime_dir / 'link.sock'}"

    @property
    def log(self) -> Path:
        return self.runtime_dir / "engine.log"

    @property
    def rpc_dir(self) -> Path:
        """For the sockets between vLLM's own processes, which it leaves behind."""
        return self.runtime_dir / "rpc"

    def command(self) -> list[str]:
        # A relative model directory is relative to this process; a hub's name is no directory.
        model = str(Path(self.model).absolute()) if Path(self.model).is_dir() else self.model
        # The console script `vllm` fails under the CPU build; the module works under both.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", model, "--uds", str(self.socket)]
        # Without this policy vLLM refuses requests with a priority, whatever the scheduler.
        command += ["--scheduling-policy", "priority"]
        # The gateway asks for usage itself: vLLM's flag that forces it would show it to clients in every chunk.
        command += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        justitia: dict[str, str | float] = {}
        if self.scheduler == "justitia":
            command += ["--scheduler-cls", "engine.scheduler.JustitiaScheduler"]
            justitia["link"] = self.link_address
            for name in ("displace_margin", "link_interval_s"):
                if (value := getattr(self, name)) is not None:
                    justitia[name] = value
        if self.forced_lengths is not None:
            command += ["--logits-processors", "engine.lab.forced_length:ForcedLength"]
            justitia["forced_lengths"] = str(self.forced_lengths)
        if justitia:
            command += ["--additional-config", json.dumps({"justitia": justitia})]
        for flag, value in (
            ("--num-gpu-blocks-override", self.kv_blocks),
            ("--block-size", self.block_size),
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-model-len", self.max_model_len),
        ):
            if value is not None:
                command += [flag, str(value)]
        if on_cpu():
            # Compiling would take minutes, and a CPU is there to try things out. In bfloat16 vLLM's CPU attention uses
            # AMX where the processor claims to have it, and on some virtual machines dies of an illegal instruction.
            command += ["--enforce-eager", "--dtype", "float32"]
        elif self.kv_cache_gib is not None:
            command += ["--kv-cache-memory-bytes", str(int(self.kv_cache_gib * 2**30))]
        return [*command, *self.extra_args]

    def environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        # The engine's processes import `engine`, wherever they are started.
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        environment["PYTHONUNBUFFERED"] = "1"  # the log is read while it is written
        environment.setdefault("VLLM_NO_USAGE_STATS", "1")  # send no usage data unless the user asks for it
        if len(os.fsencode(self.rpc_dir)) + RPC_NAME_BYTES <= SOCKET_PATH_BYTES:  # else they stay in /tmp
            environment.setdefault("VLLM_RPC_BASE_PATH", str(self.rpc_dir))
        if on_cpu():
            # Whole GiB only. By default vLLM takes most of the machine's memory.
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(self.kv_cache_gib or 1)))
        if self.forced_lengths is not None:
            # See `engine.lab.forced_length`: for admission, and because it is written for the first model runner.
            environment["JUSTITIA_FORCED_LENGTHS"] = str(self.forced_lengths)
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        return environment


def on_cpu() -> bool:
    """Whether vLLM will run on the CPU: its CPU build is installed, or there is no NVIDIA GPU."""
    found = compat.distribution()
    if found is not None and found[0] == "vllm-cpu":
        return True
    return not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


class EngineProcess:
    """One engine, started again when it ends by itself.

    `start`, then `wait_ready`, then `stop`; with `run` as a task beside them it is supervised. All in one event loop.
    """

    def __init__(
        self,
        spec: EngineSpec,
        on_state: Callable[[EngineState, str], None] | None = None,
        *,
        failures_before_ready: int = FAILURES_BEFORE_READY,
        backoff_first_s: float = BACKOFF_FIRST_S,
    ) -> None:
        """`on_state` is called with each change of the state and one line of detail, and with each milestone of a start; it
        must not raise. The other options are for tests."""
        self.spec = spec
        self.state = EngineState.STOPPED
        self.detail = "not started"
        self.restarts = 0
        self._on_state = on_state
        self._failures_before_ready = failures_before_ready
        self._backoff_first_s = backoff_first_s
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[EngineFailed] | None = None
        self._failure: EngineFailed | None = None
        self._supervised = False
        self._ready_at: float | None = None  # when this process, or one before it, became ready; None before the first
        self._spawning = asyncio.Lock()  # so that a `stop` during a `start` finds the process
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Of the API server, which leads the process group; None when there is none."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    def progress(self) -> str:
        """One line for people: the state and how far it has come."""
        return f"{self.state}: {self.detail}"

    async def start(self) -> None:
        """Starts the engine's processes, and returns at once. Raises `EngineFailed` when that is impossible."""
        async with self._spawning:
            if self.pid is None:
                await self._spawn()

    async def _spawn(self) -> None:
        self._stopping.clear()
        self._failure = None
        self._set(EngineState.STARTING, "spawning")
        findings = compat.check_version()
        if findings:
            raise self._failed(EngineFailed("; ".join(findings)))
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self.spec.command()]
        try:
            shutil.rmtree(self.spec.rpc_dir, ignore_errors=True)
            self.spec.rpc_dir.mkdir(parents=True)
            # A socket that a killed engine left behind would look like a server that refuses.
            self.spec.socket.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self.spec.log.replace(self.spec.log.with_suffix(".log.1"))
            # The engine writes to the file itself: a pipe would stop it whenever this process is slow to read.
            with self.spec.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.spec.environment(),
                    cwd=self.spec.runtime_dir,  # `python -m` puts it first in the path: nothing to import lies there
                    start_new_session=True,  # a group of its own, so that all its processes can be ended
                )
        except OSError as error:
            raise self._failed(EngineFailed(f"the engine cannot be started: {error}")) from error
        self._set(EngineState.STARTING, f"spawned, pid {self._process.pid}")
        self._watch = asyncio.create_task(self._watch_one(self._process), name="engine-watch")

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when the engine serves. Raises `EngineFailed` when it has ended for good, or after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.state is not EngineState.READY:
                    if self.state is EngineState.FAILED and self._failure is not None:
                        raise self._failure
                    if self.state is EngineState.STOPPED:
                        raise EngineFailed("the engine is stopped")
                    await self._changed.wait()
        except TimeoutError:
            raise EngineFailed(f"the engine is not ready after {timeout_s:.0f} s", log_tail=self._log_tail()) from None

    async def run(self) -> None:
        """Starts the engine unless it runs, and again whenever it ends, until `stop`.

        Raises `EngineFailed` when it failed a few times in a row without ever being ready.
        """
        self._supervised = True
        failures, backoff_s = 0, self._backoff_first_s
        try:
            await self.start()
            while self._watch is not None:
                failure = await asyncio.shield(self._watch)
                if self._stopping.is_set():
                    return
                failures += 1
                if self._ready_at is None and failures >= self._failures_before_ready:
                    reason = f"given up after {failures} starts: {failure.reason}"
                    raise self._failed(EngineFailed(reason, failure.exit_code, failure.log_tail))
                if self._ready_at is not None and asyncio.get_running_loop().time() - self._ready_at > HEALTHY_S:
                    failures, backoff_s = 0, self._backoff_first_s
                self._set(EngineState.RESTARTING, f"{failure.reason}; again in {backoff_s:g} s")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), backoff_s)
                    return
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
                self.restarts += 1
                await self.start()
        finally:
            self._supervised = False

    async def stop(self, grace_s: float = 20.0) -> None:
        """Ends all of the engine's processes: by SIGTERM, and by SIGKILL those that are left after grace_s."""
        self._stopping.set()
        async with self._spawning:
            if self._process is not None and self._watch is not None:
                group = self._process.pid
                _signal_group(group, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(_group_ended(group), grace_s)
                await _end_group(group)
                await asyncio.wait((self._watch,))
            self._process = self._watch = None
            self.spec.socket.unlink(missing_ok=True)
            shutil.rmtree(self.spec.rpc_dir, ignore_errors=True)
            if self.state is not EngineState.FAILED:
                self._set(EngineState.STOPPED, "stopped")

    async def _watch_one(self, process: asyncio.subprocess.Process) -> EngineFailed:
        """Waits for the end of one process. Returns how it ended."""
        exited = asyncio.create_task(process.wait())
        ready = asyncio.create_task(self._until_ready())
        await asyncio.wait((exited, ready), return_when=asyncio.FIRST_COMPLETED)
        was_ready = ready.done()
        if was_ready:
            self._ready_at = asyncio.get_running_loop().time()
            if on_cpu():
                keep_apart(process.pid)
            self._set(EngineState.READY, "serving")
        else:
            ready.cancel()
        while not exited.done():
            await asyncio.wait((exited,), timeout=LOG_CHECK_INTERVAL_S)
            self._bound_log()
        await asyncio.wait((ready,))
        # vLLM's other processes may outlive their server, and would keep the memory and the link's socket.
        if not self._stopping.is_set():
            await _end_group(process.pid)
        when = "" if was_ready else " before it was ready"
        failure = EngineFailed(
            f"the engine ended with {_exit_text(exited.result())}{when}", exited.result(), self._log_tail()
        )
        if not self._supervised and not self._stopping.is_set():
            self._failed(failure)
        return failure

    async def _until_ready(self) -> None:
        """Returns once `GET /health` is answered with 200; reports the milestones on the way."""
        reported = 0
        transport = httpx.AsyncHTTPTransport(uds=str(self.spec.socket))
        async with httpx.AsyncClient(transport=transport, timeout=HEALTH_TIMEOUT_S) as client:
            while True:
                reported = self._report_milestones(reported)
                # Connecting before the socket is there fails at once, and costs nothing.
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("http://engine/health")).status_code == 200:
                        return
                await asyncio.sleep(HEALTH_INTERVAL_S)

    def _report_milestones(self, reported: int) -> int:
        """Reports those of the log that come after the first `reported`. Returns how many are reported by now."""
        log = self._log_text()
        for number, (pattern, text) in enumerate(MILESTONES[reported:], reported + 1):
            if found := pattern.search(log):
                self._set(EngineState.STARTING, text.format(*found.groups()))
                reported = number
        return reported

    def _log_text(self) -> str:
        try:
            return self.spec.log.read_text(errors="replace")
        except OSError:
            return ""

    def _log_tail(self) -> tuple[str, ...]:
        """The last lines, and before them the first error: vLLM's server ends long after what its core died of."""
        lines = [line for line in self._log_text().splitlines() if line.strip()]
        tail = lines[-LOG_TAIL_LINES:]
        cause = next((line for line in lines if ERROR_LINE.search(line)), None)
        return tuple(tail) if cause is None or cause in tail else (cause, "…", *tail)

    def _bound_log(self) -> None:
        # The engine appends, so it goes on at the beginning of the emptied file. A line written in between is lost.
        with contextlib.suppress(OSError):
            if self.spec.log.stat().st_size > LOG_MAX_BYTES:
                self.spec.log.with_suffix(".log.1").write_bytes(self.spec.log.read_bytes())
                os.truncate(self.spec.log, 0)

    def _failed(self, failure: EngineFailed) -> EngineFailed:
        self._failure = failure
        self._set(EngineState.FAILED, failure.reason)
        return failure

    def _set(self, state: EngineState, detail: str) -> None:
        self.state, self.detail = state, detail
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        logger.info("engine %s: %s", state, detail)
        if self._on_state is not None:
            self._on_state(state, detail)


def _exit_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


async def _group_ended(group: int) -> None:
    while _group_runs(group):  # noqa: ASYNC110  # the kernel reports the end of children only, and some are grandchildren
        await asyncio.sleep(0.05)


async def _end_group(group: int) -> None:
    _signal_group(group, signal.SIGKILL)
    await _group_ended(group)


def _group_runs(group: int) -> bool:
    """Whether a process of the group runs. Zombies, whose parent may never collect them, do not count."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent group …", and the name may hold anything
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False
