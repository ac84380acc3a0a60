"""What Schemathesis does not check by itself: an error of the gateway is one of its tree, in its endpoint's dialect."""

from __future__ import annotations

import schemathesis

from tests.fuzz.documented import assert_documented


@schemathesis.check
def documented(ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case) -> None:
    status = response.status_code
    if status < 400:
        assert str(status) in case.operation.definition.raw["responses"]
    elif b"no JSON" not in response.content:  # as the strict engine says
        headers = {name.lower(): values[0] for name, values in response.headers.items()}
        assert_documented(case.path, status, headers, response.content)
