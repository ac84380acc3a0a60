"""The uvicorn that is installed fits, and one that does not is reported with all that it lacks."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from gateway.config.settings import GatewaySettings
from gateway.http import client_connection, uvicorn_facts
from gateway.http.uvicorn_facts import FACTS, Call, Fields, Lines, UvicornDoesNotFit, check
from gateway.server import start_gateway

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol"
CYCLE = "uvicorn.protocols.http.httptools_impl:RequestResponseCycle"


def test_the_installed_release_fits() -> None:
    check()


def test_the_range_is_that_of_the_installed_and_the_required_release() -> None:
    lowest, beyond = (tuple(map(int, one.split("."))) for one in re.findall(r"[0-9.]+", uvicorn_facts.FITS))
    assert lowest <= tuple(map(int, metadata.version("uvicorn").split(".")[:2])) < beyond
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"uvicorn{uvicorn_facts.FITS.split(',')[0]}" in required


def test_all_that_is_missing_is_reported_with_the_version() -> None:
    facts = (
        Call(f"{PROTOCOL}.on_body", "body"),
        Call(f"{PROTOCOL}.on_body", "body mood"),
        Call(f"{PROTOCOL}.on_mood", ""),
        Call("uvicorn.moods:Mood", ""),
        Fields(PROTOCOL, "cycle mood pipeline luck"),
        Lines(f"{CYCLE}.receive", ("await self.message_event.wait()", "return mood")),
        Call("math:sqrt.__text_signature__", ""),
    )
    with pytest.raises(UvicornDoesNotFit) as raised:
        check(facts)
    head, *complaints = str(raised.value).splitlines()
    assert head == f"uvicorn {metadata.version('uvicorn')} does not fit, {uvicorn_facts.FITS} does:"
    assert complaints.pop().startswith("math:sqrt.__text_signature__ cannot be read (")
    assert complaints == [
        f"{PROTOCOL}.on_body takes (body), not (body mood)",
        f"{PROTOCOL}.on_mood is missing (type object 'HttpToolsProtocol' has no attribute 'on_mood')",
        "uvicorn.moods:Mood is missing (No module named 'uvicorn.moods')",
        f"{PROTOCOL} has no mood, luck",
        f"{CYCLE}.receive does not contain `return mood`",
    ]


async def test_a_gateway_does_not_start_on_a_release_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_facts.check, "__defaults__", ((Fields(CYCLE, "mood"),),))
    with pytest.raises(UvicornDoesNotFit, match="has no mood"):
        await start_gateway(GatewaySettings(port=0, state="memory:", engine="http://127.0.0.1:1"))


def test_what_a_connection_reads_of_uvicorn_is_in_the_table() -> None:
    """Names of the class above that occur in our own: overridden, or read as `self.…`."""
    base = client_connection.HttpToolsProtocol
    ours = client_connection.ClientConnection
    source = Path(client_connection.__file__).read_text()
    of_base = set(vars(base)) | set(re.findall(r"\bself\.(\w+)(?:: [^=\n]+)? = ", _source_of(base)))
    read = {name for name in of_base if re.search(rf"\bself\.{name}\b", source)} | (set(vars(ours)) & set(vars(base)))
    known = {fact.name.rpartition(".")[2] for fact in FACTS if fact.name.startswith(PROTOCOL)}
    known |= {
        field for fact in FACTS if isinstance(fact, Fields) and fact.name == PROTOCOL for field in fact.fields.split()
    }
    own = {"__module__", "__doc__", "__firstlineno__", "__static_attributes__"}
    assert read - own <= known


def _source_of(found: type) -> str:
    return (
        Path(__import__(found.__module__, fromlist=["_"]).__file__).read_text().partition(f"class {found.__name__}")[2]
    )
