"""The document says what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Route

from gateway.api.openapi import OPEN
from gateway.app import create_app
from gateway.config.settings import GatewaySettings
from gateway.protocol import body as body_module
from gateway.protocol.body import parse_body
from gateway.protocol.endpoints import ENDPOINTS, Endpoint
from gateway.protocol.errors import GatewayError, InvalidRequest
from gateway.protocol.identify import identify

# As it is published: a test of the documents holds it to the code.
PUBLISHED = json.loads((Path(__file__).resolve().parents[2] / "docs" / "reference" / "openapi.json").read_text())
NOT_OURS = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


@pytest.fixture
async def served() -> AsyncIterator[tuple[dict[str, Any], set[tuple[str, str]]]]:
    """The document, and the methods and paths that are served."""
    app = await create_app(GatewaySettings(engine="http://127.0.0.1:1", state="memory:"))
    routes = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route) and route.path not in NOT_OURS
        for method in route.methods or ()
    }
    yield app.openapi(), routes
    await app.client.close()


async def test_all_that_is_served_is_in_it(served: tuple[dict[str, Any], set[tuple[str, str]]]) -> None:
    document, routes = served
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == {(method, path) for method, path in routes if method != "HEAD"}


async def test_names_are_unique_and_references_lead_somewhere(served: tuple[dict[str, Any], Any]) -> None:
    document, _ = served
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        place = document
        for part in reference.split("/"):
            place = place[part]


async def test_who_needs_a_key_is_told(served: tuple[dict[str, Any], Any]) -> None:
    document, _ = served
    assert {} in document["security"], "none are wanted where none are configured"
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert (operation.get("security") == []) == (path in OPEN)
            assert ("401" in operation["responses"]) == (path not in OPEN)


async def test_every_error_is_told_where_it_can_come_with_when_to_try_again(served: tuple[dict[str, Any], Any]) -> None:
    document, _ = served
    told = document["paths"]["/v1/messages"]["post"]["responses"]
    for error in GatewayError.__subclasses__():
        assert (str(error.status) in told) == (error.status != 404)
    for status in ("429", "503"):
        response = document["components"]["responses"][told[status]["$ref"].rpartition("/")[2]]
        assert "Retry-After" in response["headers"]
        (value, *_) = response["content"]["application/json"]["examples"].values()
        assert value["value"]["type"] == "error", "in Anthropic's shape"


async def test_every_field_that_is_read_is_told(
    served: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    document, _ = served

    class Watched(dict[str, Any]):
        """Remembers what was looked for."""

        looked_for: set[str]

        def get(self, name: str, default: Any = None) -> Any:
            self.looked_for.add(name)
            return super().get(name, default)

    fields = Watched()
    monkeypatch.setattr(body_module, "_decode_object", lambda data: fields)
    for endpoint in ENDPOINTS:
        fields.looked_for = set()
        identify({}, parse_body(b"{}", endpoint).fields)
        assert fields.looked_for <= _schema(document, endpoint)["properties"].keys()


WRONG = {
    "boolean": (1, "true", [], {}),
    "integer": ("5", 1.5, -1, True, []),
    "object": ("x", [], 5),
    "string": (5, "two words", []),
}


async def test_what_a_field_is_told_to_be_is_checked(served: tuple[dict[str, Any], Any]) -> None:
    document, _ = served
    for endpoint in ENDPOINTS:
        for name, schema in _schema(document, endpoint)["properties"].items():
            if "type" not in schema or name == "previous_response_id":
                continue
            kind, null = schema["type"]
            assert null == "null"
            identify({}, parse_body(json.dumps({name: None}).encode(), endpoint).fields)
            for wrong in WRONG[kind]:
                with pytest.raises(InvalidRequest) as refused:
                    identify({}, parse_body(json.dumps({name: wrong}).encode(), endpoint).fields)
                assert refused.value.param == name


def _schema(document: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    operation = document["paths"][endpoint.path]["post"]
    schema: dict[str, Any] = operation["requestBody"]["content"]["application/json"]["schema"]
    return schema


@pytest.mark.parametrize("parameter", PUBLISHED["components"]["parameters"].values(), ids=lambda told: told["name"])
@given(data=st.data())
def test_headers_are_taken_as_their_patterns_say(parameter: dict[str, Any], data: st.DataObject) -> None:
    pattern = parameter["schema"]["pattern"]
    numbers = st.from_regex(r"[0-9]{1,9}(\.[0-9]{0,10})?", fullmatch=True)
    value = data.draw(st.from_regex(pattern, fullmatch=True) | numbers | st.text(st.characters(max_codepoint=0xFF)))
    try:
        identify({parameter["name"].lower(): value}, {})
    except InvalidRequest:
        assert not re.fullmatch(pattern, value)
    else:
        assert re.fullmatch(pattern, value)
