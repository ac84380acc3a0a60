"""The engines that stand side by side, and the setups in which their tokens are compared."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from engine.launcher import EngineProcess, EngineSpec, on_cpu
from gateway.demo.engine_watch import watching
from gateway.demo.processes import apart
from tests.benchmarks.engine_check.answers import CheckFailed, Engine
from tests.benchmarks.engine_check.comparison import TIE, TIE_GPU
from tests.benchmarks.engine_check.models import LORA_RANK
from tests.benchmarks.engine_check.requests import ADAPTED, ADAPTER, ANOTHER, EVERYDAY, MODEL
from tests.benchmarks.engine_check.settings import CheckSettings

STOCK, AGAIN, OURS = "stock", "stock-again", "justitia"
# Tokens in blocks: the least that vLLM's attention takes on a CPU, and its default on a GPU.
BLOCK_SIZE_CPU, BLOCK_SIZE_GPU = 32, 16
MAX_MODEL_LEN = 2048
# Of all engines of a setup: they compile for themselves, at once.
READY_S = 1800.0

# vLLM's CPU platform turns async scheduling off. As a plugin of vLLM's this turns it on again, for the comparison only.
PLUGIN = """
import sys

from vllm.platforms.cpu import CpuPlatform


def register():
    told = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        told(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True
        sys.stderr.write("async scheduling is on, on a CPU\\n")

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
"""
PLUGIN_SAYS = "async scheduling is on, on a CPU"
PLUGIN_NAME = "justitia_async_on_cpu"

# vLLM's own mode in which a row is computed alike whatever else is in the step. It is for GPUs.
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
# What of an engine's log goes into the record: which code computed, as far as vLLM says so.
SAYS = re.compile(
    r"Using \w+ attention backend|Using FlashAttention version \d|Using V\d Model Runner|Starting torch\.compile"
    r"|Graph capturing finished|FlashInfer top-p/top-k sampling disabled"
)


@dataclass(frozen=True, slots=True)
class Setup:
    """Engines whose tokens are compared, and with which requests.

    quiet: kinds that are asked for one at a time, after the crowd. On a CPU vLLM 0.32 does not survive a request with a
    seed whose prompt is computed in parts.
    """

    name: str
    args: tuple[str, ...]
    kinds: tuple[str, ...]
    quiet: tuple[str, ...] = ()
    overlapped: bool = False  # a step is scheduled before the last one's tokens are back
    dtype: str = "float32"
    batch_invariant: bool = False
    tie: float = TIE


def setups(adapter: Path, another: Path) -> list[Setup]:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    lora: tuple[str, ...] = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", str(LORA_RANK))
    lora += ("--lora-modules", f"{ADAPTER}={adapter}", f"{ANOTHER}={another}")
    # On a CPU vLLM 0.32 computes requests without an adapter with one, in steps that they share with requests that have
    # one (its index -1 takes the last): two stock engines then differ as well.
    adapted = ADAPTED if on_cpu() else (*ADAPTED, "plain", "streaming")
    compared = [
        Setup("async scheduling", ("--async-scheduling",), EVERYDAY, overlapped=True),
        Setup("one step at a time", ("--no-async-scheduling",), EVERYDAY, quiet=("n > 1, sampled",)),
        Setup(
            "n-gram speculative decoding",
            ("--speculative-config", json.dumps(drafts)),
            ("plain", "chunked prefill", "few tokens allowed", "structured output", "streaming"),
        ),
        # On a GPU vLLM's kernels for adapters take 16 bits only.
        Setup("LoRA", lora, adapted, dtype="float32" if on_cpu() else "bfloat16"),
    ]
    if on_cpu():
        return compared
    # A GPU's results depend on what else is in the step. So all is compared where vLLM turns that off, and the first once
    # more as it is shipped. Rounding was seen in the former too: see docs/benchmarks/engine.md.
    compared = [replace(setup, tie=TIE_GPU) for setup in compared]
    shipped = replace(compared[0], name=f"{compared[0].name}, as shipped")
    return [shipped, *(replace(setup, batch_invariant=True) for setup in compared)]


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Processes that are started meanwhile have this variable."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def async_on_cpu(directory: Path) -> Iterator[None]:
    """Engines that are started meanwhile overlap their steps on a CPU too."""
    metadata = directory / f"{PLUGIN_NAME}-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN_NAME}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN_NAME} = {PLUGIN_NAME}:register\n")
    (directory / f"{PLUGIN_NAME}.py").write_text(PLUGIN)
    path = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))
    with environment("PYTHONPATH", path):
        yield


class Stage:
    """Where engines are started: directories, settings, and whom to tell."""

    def __init__(self, settings: CheckSettings, directory: Path, models: dict[str, Path], console: Console) -> None:
        self.settings = settings
        self.models = models
        self.console = console
        self.said: dict[str, list[str]] = {}  # by what was started: see `SAYS`
        self._directory = directory
        self._started = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (STOCK, AGAIN, OURS) if self.settings.control else (STOCK, OURS)

    @contextlib.asynccontextmanager
    async def engines(
        self,
        what: str,
        model: Path,
        *args: str,
        overlapped: bool = False,
        batch_invariant: bool = False,
        kv_cache_gib: float = 1.0,
    ) -> AsyncIterator[dict[str, Engine]]:
        """One of each name, serving; somebody listens to the link of ours. Raises `EngineFailed` and `CheckFailed`.

        kv_cache_gib: of each. Said beforehand, for an engine that measured the GPU's memory would take the others'
        starting for a mistake.
        """
        self.console.print(f"{what}: starting {len(self.names)} engines")
        async with contextlib.AsyncExitStack() as stack:
            processes: dict[str, EngineProcess] = {}
            if overlapped and on_cpu():
                stack.enter_context(async_on_cpu(self._directory / "plugin"))
            if batch_invariant:
                stack.enter_context(environment(BATCH_INVARIANT, "1"))
            for name in self.names:
                process = EngineProcess(self._spec(name, model, args, kv_cache_gib))
                stack.push_async_callback(process.stop, 5.0)
                processes[name] = process
                await process.start()
            await asyncio.gather(*(process.wait_ready(READY_S) for process in processes.values()))
            self.said[what] = sorted(set(SAYS.findall(processes[OURS].spec.log.read_text(errors="replace"))))
            if overlapped and on_cpu():
                for process in processes.values():
                    if PLUGIN_SAYS not in process.spec.log.read_text(errors="replace"):
                        raise CheckFailed("vLLM did not take the plugin that turns async scheduling on")
            if on_cpu() and (pid := processes[OURS].pid) is not None:
                stack.enter_context(apart(pid))
            watch = await stack.enter_async_context(watching(processes[OURS].spec.link_address))
            yield {
                name: await stack.enter_async_context(Engine(process.spec.socket))
                for name, process in processes.items()
            }
            if watch.figures() is None:
                raise CheckFailed("nothing was heard on the link")

    def _spec(self, name: str, model: Path, args: tuple[str, ...], kv_cache_gib: float) -> EngineSpec:
        self._started += 1
        machine: tuple[str, ...] = ()
        if not on_cpu():
            # That much has to be free when an engine starts; no more follows from it.
            machine = ("--gpu-memory-utilization", f"{0.9 / len(self.names):.3f}")
        return EngineSpec(
            model=str(model),
            runtime_dir=self._directory / f"e{self._started}",
            max_num_seqs=self.settings.max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            block_size=block_size(),
            kv_cache_gib=kv_cache_gib,
            scheduler="justitia" if name == OURS else "stock",
            extra_args=("--served-model-name", MODEL, "--seed", "0", *machine, *args),
        )


def block_size() -> int:
    return BLOCK_SIZE_CPU if on_cpu() else BLOCK_SIZE_GPU
