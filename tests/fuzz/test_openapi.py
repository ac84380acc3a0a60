"""Everything that the gateway's own document says can be asked, and much that it says cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import schemathesis

from tests.fuzz.bounds import TIMES, bounded
from tests.fuzz.conftest import Fuzzed
from tests.fuzz.documented import assert_documented

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "reference" / "openapi.json"
CONFIG = {
    "generation": {"deterministic": TIMES == 1},
    "operations": [
        # No response has been kept that one could go on from.
        {
            "include-path": "/v1/responses",
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400"]}},
        },
    ],
}

told: dict[str, Any] = json.loads(DOCUMENT.read_text())
schema = schemathesis.openapi.from_dict(told, config=schemathesis.Config.from_dict(CONFIG))


@schema.parametrize()
@bounded(30)
def test_the_gateway_does_as_its_document_says(case: schemathesis.Case, fuzzed: Fuzzed) -> None:
    answer = case.call(base_url=fuzzed.url)
    case.validate_response(answer)
    status = answer.status_code
    if status < 400:
        assert str(status) in told["paths"][case.path][case.method.lower()]["responses"]
    elif b"no JSON" not in answer.content:
        headers = {name.lower(): values[0] for name, values in answer.headers.items()}
        assert_documented(case.path, status, headers, answer.content)


def test_the_document_is_told(fuzzed: Fuzzed) -> None:
    assert httpx.get(f"{fuzzed.url}/openapi.json").json() == told
