"""Writes what is in this folder from the code: `python docs/reference/generate.py`. A test says when they are out of date."""

from __future__ import annotations

import asyncio
import json
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from gateway.app import create_app
from gateway.check import schema
from gateway.config.settings import PREFIX, GatewaySettings, ServeSettings, TenantSettings
from gateway.protocol.errors import GatewayError, Outcome, Reason
from gateway.reload import reloadable
from gateway.telemetry.metrics import MAX_CLASSES, MAX_MODELS, MAX_TENANTS, Metrics

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Made by generate.py from the code. -->"


def settings_page() -> str:
    def table(settings: type[GatewaySettings], leave_out: set[str]) -> list[str]:
        lines = ["| flag | environment | default | reload | |", "|---|---|---|---|---|"]
        for name, field in settings.model_fields.items():
            if name not in leave_out:
                flag = "" if SUPPRESS in field.metadata else f"`--{name.replace('_', '-')}`"
                default = _default(name, field.get_default(call_default_factory=False), bool(field.default_factory))
                reload = "✓" if name in reloadable(settings) else ""
                variable = f"`{PREFIX}{name.upper()}`"
                lines.append(f"| {flag} | {variable} | {default} | {reload} | {field.description} |")
        return lines

    tenants = ["| name | default | |", "|---|---|---|"]
    for name, field in TenantSettings.model_fields.items():
        tenants.append(f"| `{name}` | {_default(name, field.default, False)} | {field.description} |")
    return "\n".join(
        [
            NOTE,
            "# Settings",
            "",
            "A flag goes over the environment, over a line of the settings file (named as the flag, with `_` for `-`),",
            "over the default. An unknown name is an error in all three. [How to write the file](../how-to/configure.md),",
            "and [its JSON schema](justitia.schema.json). What has a ✓ can change while the gateway serves: SIGHUP has",
            "it read again.",
            "",
            "## `justitia gateway` and `justitia serve`",
            "",
            *table(GatewaySettings, set()),
            "",
            "## `justitia serve` only",
            "",
            "`--engine` and `--link` are its own engine's, whatever is given.",
            "",
            *table(ServeSettings, set(GatewaySettings.model_fields)),
            "",
            "## Of each tenant",
            "",
            "In the settings file, under `tenants` and the tenant's name; or as JSON in `JUSTITIA_TENANTS`.",
            "",
            *tenants,
            "",
        ]
    )


def _default(name: str, default: Any, made: bool) -> str:
    if made:
        return {"state": "`sqlite:///…/state.db` in `$XDG_STATE_HOME/justitia`"}[name]
    return "" if default in (None, "", (), {}) else f"`{default}`"


def metrics_page() -> str:
    registry = CollectorRegistry()
    Metrics(registry, version="", policy="")
    lines = [
        NOTE,
        "# Metrics",
        "",
        f"Labels with a class hold at most {MAX_CLASSES:,} classes, of which a tenant adds at most as many as it leaves",
        f"room for; those with a tenant hold {MAX_TENANTS:,} tenants; others are `other`. Without keys there is one tenant,",
        f"`default`. Those with a model hold {MAX_MODELS} models, which the engine must have served.",
        "",
    ]
    lines += ["| name | kind | labels | |", "|---|---|---|---|"]
    collectors = registry._collector_to_names  # the only list of collectors with their labels
    for collector in collectors:
        described: Any = collector
        (family,) = described.describe()
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = ", ".join(f"`{label}`" for label in described._labelnames)
        lines.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join([*lines, ""])


def errors_page() -> str:
    lines = [
        NOTE,
        "# Errors and outcomes",
        "",
        "Every error of the gateway has OpenAI's shape:",
        '`{"error": {"message", "type", "param", "code"}}`. What the engine answers passes through as it is. A stream',
        'that fails after its first byte ends with an event `data: {"error": …}` and `data: [DONE]`.',
        "",
        "| status | code | type | outcome |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {error.status} | `{error.code}` | `{error.type}` | `{error.outcome}` |"
        for error in sorted(GatewayError.__subclasses__(), key=lambda error: (error.status, error.code))
    ]
    lines += ["", "Outcomes, as the label of metrics: " + ", ".join(f"`{outcome}`" for outcome in Outcome) + "."]
    lines += ["", "Reasons of rejections, likewise: " + ", ".join(f"`{reason}`" for reason in Reason) + ".", ""]
    return "\n".join(lines)


def schema_page() -> str:
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def openapi_page() -> str:
    async def told() -> dict[str, Any]:
        app = await create_app(GatewaySettings(engine="http://127.0.0.1", state="memory:"))
        await app.client.close()
        return app.openapi()

    return json.dumps(asyncio.run(told()), indent=2, ensure_ascii=False) + "\n"


PAGES = {
    "justitia.schema.json": schema_page,
    "openapi.json": openapi_page,
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "errors.md": errors_page,
}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make())
