"""What `docs/how-to/observe.md` says of lines and spans is what there is."""

from __future__ import annotations

import json
import re

import msgspec

from gateway.telemetry.request_log import Line
from tests.docs.test_documents import ROOT

TEXT = (ROOT / "docs" / "how-to" / "observe.md").read_text()
NAMES = [field.encode_name for field in msgspec.structs.fields(Line)]


def test_every_field_of_a_line_is_told_and_in_the_example() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(NAMES)
    example = re.search(r"```json\n(.*)\n```", TEXT)
    assert example is not None
    assert list(json.loads(example[1])) == NAMES
    assert msgspec.json.decode(example[1], type=Line, strict=True)


def test_attributes_and_metrics_that_are_named_exist() -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "gateway" / "telemetry").rglob("*.py")))
    for attribute in re.findall(r"`((?:gen_ai|http|error)\.[a-z_.]+)`", TEXT):
        assert f'"{attribute}"' in code
    for metric in re.findall(r"`(?:justitia_|gen_ai_server_)(\w+)`", TEXT):
        assert metric in code
