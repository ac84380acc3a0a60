"""Prometheus' rules and Grafana's dashboard: they load, ask for metrics that exist, and alert when they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/justitia.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
ADDED_BY_PROMETHEUS = {"job", "instance", "le", "alertname", "alertstate"}


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is missing: apt-get install prometheus")
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


def dashboard_expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of every panel and annotation, Grafana's variables replaced."""
    found = [(panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", [])]
    found += [(note["name"], note["expr"]) for note in DASHBOARD["annotations"]["list"] if "expr" in note]
    replaced = []
    for where, expression in found:
        expression = (
            expression.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$agent_class", ".*")
        )
        assert "$" not in expression, f"{where}: a variable that the dashboard does not have"
        replaced.append((where, expression))
    return replaced


def expressions() -> list[tuple[str, str]]:
    return dashboard_expressions() + [(rule.get("alert", rule.get("record", "")), rule["expr"]) for rule in RULES]


def declared() -> dict[str, set[str]]:
    """Name of every series the gateway exposes → its labels."""
    metrics = pytest.importorskip("gateway.telemetry.metrics")
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    metrics.Metrics(registry)
    series: dict[str, set[str]] = {}
    for collector, names in registry._collector_to_names.items():
        labels = set(getattr(collector, "_labelnames", ()))
        if any(name.endswith("_info") for name in names):
            labels = {"version", "policy"}
        for name in names:
            series[name] = labels
    return series


@pytest.mark.wire
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


@pytest.mark.wire
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("rules_test.yml")))


def test_every_alert_is_tested_and_says_what_it_means() -> None:
    tests = yaml.safe_load(Path(__file__).with_name("rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    for rule in RULES:
        if "alert" not in rule:
            continue
        assert {"summary", "description"} <= set(rule["annotations"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        mine = [case for case in cases if case["alertname"] == rule["alert"]]
        assert any(case["exp_alerts"] for case in mine), f"{rule['alert']} is never seen to fire"


@pytest.mark.wire
def test_every_expression_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, (_, expression) in enumerate(dashboard_expressions())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "--lint=none", str(file))


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_metrics_and_labels_are_those_of_the_gateway(where: str, expression: str) -> None:
    series = declared()
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    named = set(re.findall(r"\bjustitia[\w:]*", re.sub(r'"[^"]*"', '""', expression)))
    for name in named:
        assert name in (recorded if ":" in name else series), f"{where}: {name}"
    for name, matchers in re.findall(r"\b(justitia_\w+)\{([^}]*)\}", expression):
        for label in re.findall(r"(\w+)\s*[=!]", matchers):
            assert label in series[name] | ADDED_BY_PROMETHEUS, f"{where}: {name} has no label {label}"
    labels = set().union(*(series.get(name, set()) for name in named)) | ADDED_BY_PROMETHEUS
    for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in grouping.split(",")} <= labels, f"{where}: by ({grouping})"


def test_the_variable_of_the_dashboard_asks_for_a_metric_of_the_gateway() -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert label in declared()[metric]


def test_every_row_that_was_promised_is_there() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Agents", "Fairness and prediction", "Learning", "Engine", "Requests"]


def test_panels_have_ids_of_their_own_descriptions_and_the_provisioned_datasource() -> None:
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    expected = {"type": "prometheus", "uid": source["uid"]}
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["datasource"] == expected
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))
        assert all(target["datasource"] == expected for target in panel["targets"])


def test_panels_do_not_lie_on_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_grafana_is_shown_the_folder_that_compose_mounts() -> None:
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/justitia.yml").read_text())[
        "providers"
    ]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    path = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{path}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{path}/justitia.json"
