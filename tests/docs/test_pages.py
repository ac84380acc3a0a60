"""The pages with figures are what their templates and results make of them."""

from __future__ import annotations

import importlib
from typing import Any

import msgspec
import pytest

from tests.docs.test_documents import ROOT

PAGES = {"replay": "replay_report", "predictor": "predictor_report", "scheduler": "engine_report"}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_made_of_its_results(name: str) -> None:
    report: Any = importlib.import_module(f"tests.benchmarks.{PAGES[name]}")
    results = (ROOT / "docs" / "benchmarks" / "results" / f"{name}.json").read_bytes()
    if name == "scheduler":
        found = msgspec.convert(msgspec.json.decode(results)["rows"], list[report.Row])
    else:
        found = msgspec.json.decode(results, type=report.Report)
    assert (ROOT / "docs" / "benchmarks" / f"{name}.md").read_text() == report.page(found)
