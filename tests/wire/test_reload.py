"""SIGHUP: settings that are right are taken over while tasks wait and run; of those that are not, nothing is."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import pty
import re
import signal
import sys
import termios
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import Gateway
from gateway.check import Checked
from gateway.config.problems import Wrong
from gateway.config.settings import GatewaySettings, TenantSettings
from gateway.config.sources import Reading
from gateway.reload import Check, Reloader, reloadable
from gateway.tenancy.keys import Keys, add_key
from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.scripted_engine import ScriptedEngine, wait_for_word
from tests.wire.test_commands import Command, justitia

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "justitia listens on "


class Served:
    """A gateway in a process of its own, with a settings file."""

    def __init__(self, command: Command, client: httpx.AsyncClient, file: Path) -> None:
        self.command, self.client, self.file = command, client, file
        self.settings: dict[str, Any] = {}

    def write(self, **changed: Any) -> None:
        """Settings that go over those before; None takes one out."""
        self.settings |= changed
        self.file.write_text(
            "".join(f"{name}: {value}\n" for name, value in self.settings.items() if value is not None)
        )

    def hang_up(self) -> None:
        self.command.process.send_signal(signal.SIGHUP)

    async def said(self, text: str) -> None:
        """Since the last time that this was asked."""
        await self.command.until_said(text)
        self.command.said = ""

    async def policy(self) -> str:
        health: dict[str, str] = (await self.client.get("/health")).json()
        text = (await self.client.get("/metrics")).text
        assert f'justitia_build_info{{policy="{health["policy"]}"' in text
        return health["policy"]

    async def reloads(self, outcome: str) -> float:
        text = (await self.client.get("/metrics")).text
        found = re.search(rf'^justitia_reloads_total{{outcome="{outcome}"}} (\S+)$', text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    async def until_waiting(self, count: int) -> None:
        async with asyncio.timeout(10):
            while f'justitia_tasks{{state="waiting"}} {count:.1f}' not in (await self.client.get("/metrics")).text:
                await asyncio.sleep(0.01)

    def task(self, agent: str, prompt: str, **fields: Any) -> asyncio.Task[httpx.Response]:
        body = {"model": "tiny", "prompt": prompt, **fields}
        return asyncio.create_task(self.client.post("/v1/completions", json=body, headers={"X-Agent-ID": agent}))


@asynccontextmanager
async def gateway(engine: ScriptedEngine, file: Path, **settings: Any) -> AsyncIterator[Served]:
    served = Served(None, None, file)  # type: ignore[arg-type]
    served.write(engine=engine.url, port=0, state="'memory:'", **settings)
    async with justitia("gateway", "--config", str(file)) as command:
        await command.until_said(BEGIN)
        url = command.said.rpartition(BEGIN)[2].split(",")[0]
        if "the engine is up" not in command.said:
            await command.until_said("the engine is up")
        command.said = ""
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            served.command, served.client = command, client
            yield served
            assert await command.end(signal.SIGTERM) == 0


async def test_limits_and_policy_change_while_tasks_wait_and_run(scripted: ScriptedEngine, tmp_path: Path) -> None:
    scripted.default = wait_for_word
    async with gateway(scripted, tmp_path / "j.yaml", policy="fcfs", max_in_flight=1, max_waiting=2) as served:
        tasks = [served.task("first", "x")]
        await scripted.until(lambda engine: len(engine.bodies) == 1)
        tasks.append(served.task("large", "x " * 2000, max_tokens=900))
        await served.until_waiting(1)
        tasks.append(served.task("small", "x", max_tokens=2))
        await served.until_waiting(2)
        assert (await served.task("refused", "x")).status_code == 429

        served.write(policy="justitia", max_waiting=3, max_queue_s=50)
        served.hang_up()
        await served.said("settings reloaded: policy fcfs → justitia, max_waiting 2 → 3, max_queue_s 600.0 → 50.0")
        assert (await served.policy(), await served.reloads("applied")) == ("justitia", 1)
        tasks.append(served.task("smallest", "x", max_tokens=1))
        await served.until_waiting(3)
        assert (await served.task("refused", "x")).status_code == 429
        assert len(scripted.bodies) == 1, "what ran goes on"

        scripted.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 4
        assert [body.get("max_tokens") for body in scripted.bodies] == [None, 1, 2, 900]


async def test_more_slots_are_filled_at_once(scripted: ScriptedEngine, tmp_path: Path) -> None:
    scripted.default = wait_for_word
    async with gateway(scripted, tmp_path / "j.yaml", max_in_flight=1) as served:
        tasks = [served.task(name, "x") for name in "abc"]
        await served.until_waiting(2)
        served.write(max_in_flight=3)
        served.hang_up()
        await scripted.until(lambda engine: len(engine.bodies) == 3)
        scripted.go.set()
        assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}


async def test_of_settings_that_are_wrong_nothing_is_taken(scripted: ScriptedEngine, tmp_path: Path) -> None:
    file = tmp_path / "j.yaml"
    async with gateway(scripted, file, policy="fcfs") as served:
        served.write(policy="las", max_wating=3, beta=-1)
        served.hang_up()
        await served.said(f"{file}:6:1: beta: must be greater than 0, not -1")
        served.write(max_wating=None, beta=None)

        before = served.settings["port"]
        served.write(port=8000, state="redis://h")
        served.hang_up()
        await served.said(f"{file}:2:1: port: cannot change while the gateway serves: it needs a restart")
        served.write(port=before, state="'memory:'")

        file.write_text("policy: [\n")
        served.hang_up()
        await served.said("this is not YAML")

        file.unlink()
        served.hang_up()
        await served.said(f"{file}: cannot be read: No such file or directory")
        assert (await served.policy(), await served.reloads("applied"), await served.reloads("refused")) == (
            "fcfs",
            0,
            4,
        )

        served.write()
        served.hang_up()
        await served.said("settings reloaded: policy fcfs → las")
        assert (await served.policy(), await served.reloads("applied"), await served.reloads("refused")) == (
            "las",
            1,
            4,
        )


async def test_tenants_and_keys_change_too(scripted: ScriptedEngine, tmp_path: Path) -> None:
    async with gateway(scripted, tmp_path / "j.yaml", keys=tmp_path / "keys") as served:
        assert (await served.task("a", "x")).status_code == 200
        _, secret = add_key(tmp_path / "keys", "red", "", datetime.now(UTC))
        served.write(tenants="{red: {max_waiting_mib: 0.001}, blue: }")
        served.hang_up()
        await served.said("settings reloaded: tenants")
        await served.said("tenants.blue: has no key")
        assert (await served.task("a", "x")).status_code == 401
        served.client.headers["X-Api-Key"] = secret
        assert (await served.task("a", "x")).status_code == 200
        assert (await served.task("a", "x" * 2000)).status_code == 413
        (tmp_path / "keys").write_text("{")
        served.write(policy="vtc")
        served.hang_up()
        await served.said(f"{served.file}:4:1: keys: ")
        assert await served.policy() == "justitia"


async def test_a_second_signal_while_settings_are_being_read_has_them_read_again(
    scripted: ScriptedEngine, tmp_path: Path
) -> None:
    """The file is a pipe: whoever reads it waits until somebody writes. The gateway serves meanwhile."""
    file = tmp_path / "j.yaml"
    async with gateway(scripted, file, policy="fcfs") as served:
        lines = file.read_text()
        file.unlink()
        os.mkfifo(file)
        served.hang_up()
        writing = await asyncio.to_thread(os.open, file, os.O_WRONLY)  # it is being read
        served.hang_up()
        served.hang_up()
        assert (await served.task("a", "x")).status_code == 200
        assert await served.policy() == "fcfs"
        os.write(writing, lines.replace("fcfs", "las").encode())
        os.close(writing)
        await served.said("settings reloaded: policy fcfs → las")
        await asyncio.to_thread(file.write_text, lines.replace("fcfs", "sjf"))
        await served.said("settings reloaded: policy las → sjf")
        assert (await served.policy(), await served.reloads("applied")) == ("sjf", 2)


async def test_a_file_that_comes_later_is_taken_when_it_is_asked_for(
    scripted: ScriptedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    later = tmp_path / "justitia.yaml"
    arguments = ("--engine", scripted.url, "--port", "0", "--state", "memory:")
    async with justitia("gateway", *arguments, PYTHONPATH=str(ROOT)) as command:
        await command.until_said("the engine is up")
        later.write_text("policy: vtc\nport: 8000\n")
        command.process.send_signal(signal.SIGHUP)
        await command.until_said("settings reloaded: policy justitia → vtc")
        assert await command.end(signal.SIGTERM) == 0


# The terminal


@pytest.mark.parametrize("ignored", [False, True], ids=["in the foreground", "under nohup"])
async def test_a_gateway_whose_terminal_is_gone_ends_as_ever_unless_it_is_to_outlive_it(ignored: bool) -> None:
    controller, terminal = pty.openpty()

    def belong() -> None:
        """To this terminal, in a session of its own."""
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway.cli", "gateway", "--engine", "http://127.0.0.1:1", "--port", "0"),
        *("--state", "memory:"),
        stdin=terminal,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        preexec_fn=belong,
    )
    os.close(terminal)
    command = Command(process)
    try:
        await command.until_said(BEGIN)
        process.send_signal(signal.SIGHUP)
        await command.until_said("settings reloaded: none has changed")
        command.said = ""
        os.close(controller)
        if ignored:
            await command.until_said("settings reloaded: none has changed")
            assert await command.end(signal.SIGTERM) == 0
        else:
            await command.until_said("shutting down: 0 waiting, 0 in flight")
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# Inside


def reloader_of(app: Gateway, begun: Checked[Any], check: Check) -> Reloader:
    return Reloader(app.dispatcher, app.tenants, app.bodies, app.observer, app.live, begun, check)


def checked(settings: GatewaySettings, keys: Keys | None = None) -> Checked[GatewaySettings]:
    return Checked(Reading(settings, ()), keys or Keys(), ())


def reloads(under_test: GatewayUnderTest) -> dict[str, float | None]:
    registry = under_test.app.metrics.registry
    return {o: registry.get_sample_value("justitia_reloads_total", {"outcome": o}) for o in ("applied", "refused")}


async def reload(reloader: Reloader) -> None:
    reloader.ask()
    assert reloader._running is not None
    await reloader._running


OTHERS: dict[str, Any] = {
    "train_limit_s": 5.0,
    "train_memory_mib": 600,
    "keys": Path("/k"),
    "tenants": {"red": TenantSettings()},
    "policy": "srjf",
    "beta": 2.0,
    "max_engine_waiting": 9,
    "max_in_flight": 7,
    "capacity_tokens": 777,
    "max_waiting": 8,
    "max_waiting_mib": 3.0,
    "max_held_mib": 4.0,
    "max_queue_s": 5.0,
    "max_body_mib": 0.5,
    "agent_idle_s": 99.0,
    "drain_s": 0.5,
    "keep_text": True,
    "train": False,
    "train_every": 3,
    "log_level": "warning",
}


async def test_all_that_is_marked_is_taken_and_the_rest_stays(start: StartGateway) -> None:
    gateway = await start()
    assert OTHERS.keys() == reloadable(GatewaySettings)
    app = gateway.app
    given = GatewaySettings(state="memory:")  # another engine and port than it has: `serve` sets its own
    level = logging.getLogger().level
    try:
        await reload(reloader_of(app, checked(given), lambda: checked(given.model_copy(update=OTHERS))))
        assert logging.getLogger().level == logging.WARNING
    finally:
        logging.getLogger().setLevel(level)
    assert reloads(gateway) == {"applied": 1, "refused": 0}
    assert {name: getattr(app.live.settings, name) for name in OTHERS} == OTHERS
    limits, engine = app.flow.queue.limits, app.flow.engine
    assert (limits.beta, limits.engine_waiting, limits.in_flight) == (2.0, 9, 7)
    assert (engine.capacity_tokens, app.flow.queue.capacity_tokens, app.flow.quotas.max_waiting) == (777, 777, 8)
    assert (app.flow.quotas.max_waiting_bytes, app.bodies.limit) == (3 * 2**20, 4 * 2**20)
    assert (await gateway.chat(max_tokens=1, padding="x" * 2**20)).status_code == 413
    assert (await gateway.chat(max_tokens=1)).status_code == 200


async def test_keys_that_would_let_everybody_in_are_refused_and_all_else_with_them(
    start: StartGateway, tmp_path: Path
) -> None:
    _, secret = add_key(tmp_path / "keys", "red", "", datetime.now(UTC))
    gateway = await start(keys=tmp_path / "keys")
    given = gateway.app.live.settings
    new = given.model_copy(update={"policy": "las", "tenants": {"red": TenantSettings(max_tasks=3)}})
    keys = Keys()
    reloader = reloader_of(gateway.app, checked(given), lambda: checked(new, keys))
    await reload(reloader)
    assert (gateway.app.live.settings.policy, reloads(gateway)) == ("justitia", {"applied": 0, "refused": 1})
    tenants, red = gateway.app.tenants, gateway.app.flow.quotas.account("red", 0)
    assert tenants.named("red").settings.max_tasks is red.limits.max_tasks is None
    keys = Keys.load(tmp_path / "keys")
    await reload(reloader)
    assert (gateway.app.live.settings.policy, reloads(gateway)) == ("las", {"applied": 1, "refused": 1})
    assert tenants.named("red").settings.max_tasks == red.limits.max_tasks == 3
    assert (await gateway.chat()).status_code == 401
    assert (await gateway.chat(headers={"Authorization": f"Bearer {secret}"})).status_code == 200


@pytest.mark.parametrize("error", [Wrong([]), RuntimeError("unforeseen")])
async def test_whatever_goes_wrong_with_reading_the_gateway_serves_as_before(
    start: StartGateway, error: Exception
) -> None:
    gateway = await start()

    def fails() -> Checked[Any]:
        raise error

    before = gateway.app.live.settings
    await reload(reloader_of(gateway.app, checked(before), fails))
    assert gateway.app.live.settings is before and reloads(gateway) == {"applied": 0, "refused": 1}
    assert (await gateway.chat()).status_code == 200


async def test_it_is_read_beside_the_loop_and_once_more_for_all_who_asked_meanwhile(start: StartGateway) -> None:
    gateway = await start()
    given = GatewaySettings(state="memory:")
    goes_on, began = threading.Event(), asyncio.Event()
    loop, reads = asyncio.get_running_loop(), 0

    def slow() -> Checked[Any]:
        nonlocal reads
        reads += 1
        loop.call_soon_threadsafe(began.set)
        assert goes_on.wait(10)
        return checked(given)

    reloader = reloader_of(gateway.app, checked(given), slow)
    reloader.ask()
    await began.wait()
    for _ in range(5):
        reloader.ask()
    assert (await gateway.chat()).status_code == 200
    goes_on.set()
    assert reloader._running is not None
    await reloader._running
    assert (reads, reloads(gateway)) == (2, {"applied": 2, "refused": 0})
