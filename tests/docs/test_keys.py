"""The commands of `docs/how-to/keys.md` are run as they stand, in one shell, before a gateway that listens somewhere else."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from pydantic import TypeAdapter

from gateway.api.usage import usage_routes
from gateway.config.settings import TenantSettings
from gateway.flowcontrol.records import UsageRow, hour_of
from gateway.tenancy.keys import Keys
from tests.wire.conftest import GatewayUnderTest, running_gateway
from tests.wire.scripted_engine import ScriptedEngine

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs" / "how-to" / "keys.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


class Books:
    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        hour = hour_of(time.time())
        return [UsageRow("red", hour, requests=1)] if since <= hour < until else []


def documents(text: str) -> list[Any]:
    """Of JSON, one behind the other."""
    found, text = [], text.strip()
    while text:
        document, end = json.JSONDecoder().raw_decode(text)
        found.append(document)
        text = text[end:].strip()
    return found


class Shell:
    """One after the other in the same bash, as a reader would. `curl` fails where it is answered with an error."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, commands: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"set -e\n{commands}\necho; echo 'done with it'\n".encode())
        said = await asyncio.wait_for(self._process.stdout.readuntil(b"\ndone with it\n"), 60)
        return said.decode().removesuffix("\ndone with it\n")


@pytest.fixture
async def gateway(tmp_path: Path):  # type: ignore[no-untyped-def]
    async with ScriptedEngine().serving() as engine:
        keys = tmp_path / "justitia" / "keys.json"
        async with running_gateway(engine=engine.url, keys=keys) as gateway:
            await gateway.until(lambda: gateway.app.flow.engine.up)
            app: FastAPI = gateway.running._server.config.app
            if "/v1/usage" not in {route.path for route in app.routes}:
                app.include_router(usage_routes(gateway.app.tenants, Books(), gateway.app.feedback.flush))
            yield gateway


@pytest.fixture
async def shell(tmp_path: Path):  # type: ignore[no-untyped-def]
    if shutil.which("curl") is None:
        if os.environ.get("CI"):
            pytest.fail("curl is missing: apt-get install curl")
        pytest.skip("curl is not installed (Debian: apt-get install curl)")
    command = tmp_path / "bin" / "justitia"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway.cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUSTITIA_")}
    environment |= {
        "PATH": f"{command.parent}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path),
        "CURL_HOME": str(tmp_path),
        "COLUMNS": "200",
    }
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        "bash", cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe, limit=2**20
    )
    yield Shell(process)
    assert process.stdin is not None
    process.stdin.close()
    await asyncio.wait_for(process.wait(), 20)


@pytest.mark.wire
async def test_the_commands_do_what_they_say(gateway: GatewayUnderTest, shell: Shell, tmp_path: Path) -> None:
    here = [block.replace("http://127.0.0.1:8000", gateway.url) for block in BLOCKS]
    make, ask, use, agents, revoke = here
    listed = await shell.run(make)
    (key,) = Keys.load(tmp_path / "justitia" / "keys.json")
    assert key.tenant == "red" and key.id in listed and "laptop of the red team" in listed
    await gateway.until(lambda: gateway.app.tenants.keys.configured)
    (answer,) = documents(await shell.run(ask))
    assert answer["choices"]
    hours, days = documents(await shell.run(use))
    assert (hours["by"], days["by"]) == ("hour", "day")
    (row,) = csv.DictReader((await shell.run("cat usage.csv")).splitlines())
    assert (row["tenant"], row["requests"]) == ("red", "1")
    (key_of_red,) = (await shell.run('echo "$KEY"')).split()
    assert (await gateway.chat("run-1", headers={"x-api-key": key_of_red})).status_code == 200
    listed_agents, agent, ended = documents(await shell.run(agents))
    assert [each["id"] for each in listed_agents["data"]] == [agent["id"]] == [ended["id"]] == ["run-1"]
    assert ended["deleted"]
    await shell.run(revoke)
    await gateway.until(lambda: all(key.revoked for key in gateway.app.tenants.keys))
    ask_again = f'curl -w "%{{http_code}}" -o refused -H "Authorization: Bearer $KEY" {gateway.url}/v1/agents || true'
    assert await shell.run(ask_again) == "401"


def test_the_limits_are_settings() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    tenants = TypeAdapter(dict[str, TenantSettings]).validate_python(yaml.safe_load(block)["tenants"])
    named = {name for settings in tenants.values() for name in settings.model_fields_set}
    assert named == TenantSettings.model_fields.keys(), "each is explained"
